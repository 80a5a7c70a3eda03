"""Breaks in ``checkpoint/`` and ``zero/``."""

from breaks.entry import Break

BREAKS = [
    Break(
        "9",
        "load weights behind the optimizer's back",
        "checkpoint/load.py::load_adapter",
        "        state.restart()\n",
        "        pass\n",
        "tests/checkpoint/test_checkpoint_faults.py -k masters_follow",
    ),
    Break(
        "9",
        "rebuild masters from bf16 weights on resume",
        "checkpoint/load.py::_read",
        "states[slot.parameter].setdefault(MASTER, weights[slot.parameter])",
        "states[slot.parameter][MASTER] = weights[slot.parameter]",
        "tests/checkpoint/test_checkpoint.py -k bf16",
    ),
    Break(
        "11",
        "load what matches",
        "checkpoint/load.py::_compare.compare",
        "        found = adapter_differences(manifest.adapters, adapters)\n",
        "        found = []\n",
        "tests/checkpoint/test_checkpoint_faults.py -k another_config",
    ),
    Break(
        "11",
        "save values that are not finite",
        "checkpoint/save.py::save_adapter",
        "    everywhere(lambda: _check_finite(slots, shards))\n",
        "",
        "tests/checkpoint/test_checkpoint_faults.py -k would_lie",
    ),
    Break(
        "11",
        "read tensor data without comparing its checksum",
        "checkpoint/storage.py::TensorReader._load",
        "        if hashlib.sha256(data).hexdigest() != record.sha256:\n",
        "        if False:\n",
        "tests/checkpoint/test_checkpoint_faults.py -k flipped_bytes",
    ),
    Break(
        "17",
        "take an edited alpha in adapter.json",
        "checkpoint/manifest.py::Manifest.read",
        'checksums.get("this file") != _self_digest(content)',
        'checksums.get("this file") is None',
        "tests/checkpoint/test_checkpoint_files.py -k edited",
    ),
    Break(
        "20",
        "name a checkpoint the latest before it is there",
        "checkpoint/directory.py::publish",
        (
            "    flush_tree(staged)\n"
            "    move_in(staged, target, old)\n"
            "    fsync(root)\n"
            "    _write_tracker(root, name)\n"
        ),
        (
            "    _write_tracker(root, name)\n"
            "    flush_tree(staged)\n"
            "    move_in(staged, target, old)\n"
            "    fsync(root)\n"
        ),
        "tests/checkpoint/test_checkpoint_files.py -k killed_at_every",
    ),
    Break(
        "20",
        "leave what a killed writer left",
        "checkpoint/directory.py::stage",
        "            shutil.rmtree(leftover)\n",
        "            pass\n",
        "tests/checkpoint/test_checkpoint_files.py -k killed_at_every",
    ),
    Break(
        "20",
        "write while training goes on, from the live tensors",
        "checkpoint/model.py::Slot.shards",
        'weight.to("cpu", copy=True, memory_format=torch.contiguous_format)',
        "weight",
        "tests/checkpoint/test_checkpoint_saving.py -k asynchronous",
    ),
    Break(
        "resume",
        "start Adam's step count anew",
        "checkpoint/optimizer.py::OptimizerState.restore",
        '            if "step" in scalars:\n',
        "            if False:\n",
        "tests/checkpoint/test_checkpoint.py::test_resume[dp2]",
    ),
    Break(
        "resume",
        "leave random states where they are",
        "checkpoint/load.py::load_adapter",
        '        rng.set_local_state(rng.unpack(common["rng"], rank()))\n',
        "        pass\n",
        "tests/checkpoint/test_checkpoint_saving.py -k random_states",
    ),
    Break(
        "22",
        "leave grouped weights of three dimensions out of the base's fingerprint",
        "checkpoint/model.py::_base_parts",
        "if base is not None and counted and layer:",
        "if base is not None and counted and layer and counted[0].dim() == 2:",
        "tests/checkpoint/test_fingerprint.py -k models_is_its_files",
    ),
    Break(
        "22",
        "count weights that every tensor-parallel rank has whole once per rank",
        "checkpoint/model.py::_over_shards",
        "replicated = bool((shards[:, n] == shards[0, n]).all())",
        "replicated = False",
        "tests/checkpoint/test_fingerprint.py -k models_is_its_files",
    ),
    Break(
        "22",
        "keep a fingerprint whatever happens to the base",
        "checkpoint/model.py::_marks",
        None,
        "return []",
        "tests/checkpoint/test_fingerprint.py -k computed_once",
    ),
    Break(
        "4bit",
        "compare a 4-bit base with what it was made of, whatever the directory holds",
        "checkpoint/model.py::_differences",
        "_remembered(model, of_source=of_source)",
        "_remembered(model, of_source=True)",
        "tests/quant/test_nf4_bases.py",
    ),
    Break(
        "22",
        "compare the first layer of the base alone",
        "checkpoint/reader.py::AdapterCheckpoint.check_base",
        'layers = [int(n) for n in saved["layers"]]',
        'layers = [int(n) for n in saved["layers"]][:1]',
        "tests/checkpoint/test_whole_base.py",
    ),
    Break(
        "20",
        "forget an asynchronous save when the model comes in another wrapper",
        "checkpoint/save.py::finish_pending",
        "if pending is not None:",
        'if pending is not None and hasattr(model[0], "ddp_config"):',
        "tests/checkpoint/test_checkpoint_saving.py -k however_it_is_wrapped",
    ),
    Break(
        "control",
        "drop what was trained beside the adapter",
        "zero/convert.py::convert_zero",
        "        if extra is None and beside:",
        "        if False:",
        "tests/zero/test_zero.py -k other_trained",
    ),
]
