"""What must not load does not load, says what differs on every rank, and leaves the model as it was.

pytest tests/checkpoint/test_checkpoint_faults.py
"""

from __future__ import annotations

import json
import shutil

import adapted
import checkpoint_runs as runs
import pytest
import torch
from checkpoint_runs import Run
from harness import Layout
from tiny_checkpoints import tiny

from slime_plugins.lora import LoRAConfig
from slime_plugins.lora.adapters import iter_adapters
from slime_plugins.lora.checkpoint.load import load_adapter
from slime_plugins.lora.checkpoint.save import save_adapter
from slime_plugins.lora.rehearsal.tiny import make_tiny

CONFIG = LoRAConfig(rank=3, alpha=12)
TWO = {"tp": 2}


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    return tiny(tmp_path_factory)


def two_saves(layout: Layout, hf_dir, config, path, other):
    """Two runs' checkpoints, with other values."""
    for number, where in enumerate((path, other)):
        run = Run(layout, hf_dir, config)
        run.start()
        run.train(number * 10, 2)
        save_adapter(run.model, where, optimizer=run.optimizer, scheduler=run.scheduler, step=2)


@pytest.fixture(scope="module")
def good(pool2, hf_dir, tmp_path_factory):
    """A checkpoint, and another run's."""
    path, other = tmp_path_factory.mktemp("good"), tmp_path_factory.mktemp("other")
    pool2.run(two_saves, hf_dir, CONFIG, path, other, **TWO)
    return path, other


def try_loads(layout: Layout, hf_dir, config, paths, before=None):
    """Load from each path. Per path: the error or None, whether the model is untouched, and its adapters."""
    results = []
    run = Run(layout, hf_dir, config)
    run.start()
    run.train(50, 1)
    for path in paths:
        untouched = [p.detach().clone() for c in run.model for p in c.parameters()]
        steps, rng = run.scheduler.num_steps, torch.get_rng_state()
        try:
            load_adapter(run.model, path, optimizer=run.optimizer, scheduler=run.scheduler)
            error = None
        except (ValueError, OSError) as raised:
            error = f"{type(raised).__name__}: {raised}"
        same = all(torch.equal(a, b) for a, b in zip(untouched, (p for c in run.model for p in c.parameters())))
        same = same and run.scheduler.num_steps == steps and torch.equal(rng, torch.get_rng_state())
        results.append((error, same, runs.whole(run.model)))
    return results


def damaged_copies(good, other, tmp_path):
    """Name -> a copy of the checkpoint with one fault."""
    files = [p.relative_to(good) for p in sorted(good.rglob("*")) if p.is_file()]
    assert len(files) == 8  # tracker, adapter.json, tensors.json, .metadata, metadata.json, common.pt, two of data
    for file in files:
        size = (good / file).stat().st_size
        for fault in (
            "deleted",
            "cut 0",
            "cut middle",
            "cut last",
            "flipped first",
            "flipped middle",
            "flipped last",
            "other",
        ):
            copy = tmp_path / f"{file.name} {fault}"
            shutil.copytree(good, copy)
            place = copy / file
            data = bytearray(place.read_bytes())
            kind, _, where = fault.partition(" ")
            at = {"first": 0, "0": 0, "middle": size // 2, "last": size - 1}.get(where, 0)
            if kind == "deleted":
                place.unlink()
            elif kind == "cut":
                place.write_bytes(data[:at])
            elif kind == "flipped":
                data[at] ^= 1
                place.write_bytes(data)
            elif (other / file).read_bytes() == data:
                continue  # the same in every run: metadata.json, the tracker
            else:
                shutil.copyfile(other / file, place)
            yield f"{file.name} {fault}", copy


def test_fault_table(pool2, hf_dir, good, tmp_path):
    """Each file deleted, truncated, with a byte flipped, of another run: an error, or the adapter that was saved."""
    path, other = good
    cases = dict(damaged_copies(path, other, tmp_path))
    per_rank = pool2.run(try_loads, hf_dir, CONFIG, [path, *cases.values()], **TWO)
    expected = per_rank[0][0][2]
    assert per_rank[0][0][0] is None and expected
    loaded = []
    for name, first, second in zip(cases, per_rank[0][1:], per_rank[1][1:]):
        error, untouched, adapters = first
        assert error == second[0], name  # the same on every rank
        if error is None:
            loaded.append(name)
            assert all(torch.equal(adapters[key], expected[key]) for key in expected), name
        else:
            assert untouched and second[1], name
            assert "\n" not in error, (name, error)
    # Newlines at the end of two text files may go, as long as what they say is clear; nothing else may.
    assert all("latest_" in name or name == "adapter.json cut last" for name in loaded), loaded


@pytest.mark.parametrize("offset", range(0, 100, 7))
def test_flipped_bytes_of_tensor_data(good, tmp_path, offset):
    """Anywhere in the data files. Read as ``slime-lora export`` reads."""
    from slime_plugins.lora.checkpoint.reader import AdapterCheckpoint

    shutil.copytree(good[0], tmp_path / "copy")
    file = sorted((tmp_path / "copy").rglob("*.distcp"))[offset % 2]
    reader = AdapterCheckpoint(tmp_path / "copy")
    keys = [
        (r.start, r.start + r.bytes, key)
        for key, entry in reader._reader.index.items()
        for r in entry.records
        if r.file == file.name and not key.startswith("optimizer.")
    ]
    start, end, _ = keys[offset % len(keys)]
    data = bytearray(file.read_bytes())
    data[start + (end - start) * offset // 100] ^= 1 << offset % 8
    file.write_bytes(data)
    with pytest.raises(ValueError, match="checksum mismatch"):
        list(AdapterCheckpoint(tmp_path / "copy").projections())


def load_other(layout: Layout, hf_dir, config, path, prepare=None, kwargs=None):
    """Error of loading into a model of another config."""
    run = Run(layout, hf_dir, config)
    before = [p.detach().clone() for c in run.model for p in c.parameters()]
    try:
        load_adapter(run.model, path, optimizer=run.optimizer, scheduler=run.scheduler, **(kwargs or {}))
        error = None
    except (ValueError, OSError) as raised:
        error = str(raised)
    same = all(torch.equal(a, b) for a, b in zip(before, (p for c in run.model for p in c.parameters())))
    return error, same


DIFFERENT = [
    ("rank", {"rank": 4}, "ranks 3 in the checkpoint, 4 here"),
    ("alpha", {"alpha": 6}, "scalings 4.0 in the checkpoint, 2.0 here"),
    ("rslora", {"use_rslora": True}, "scalings 4.0 in the checkpoint, 6.9"),
    ("layout", {"layout": "split"}, "layout fused in the checkpoint, split here"),
    ("fewer", {"target_modules": ("linear_qkv", "linear_fc1")}, "this model has no adapter for decoder.layers.0"),
    ("part", {"target_modules": ("q_proj", "linear_proj", "linear_fc1", "linear_fc2")}, "projections q_proj, k_proj"),
]


@pytest.mark.parametrize("change, message", [case[1:] for case in DIFFERENT], ids=[case[0] for case in DIFFERENT])
def test_another_config_is_refused(pool2, hf_dir, good, change, message):
    config = LoRAConfig(**{"rank": 3, "alpha": 12, **change})
    for error, untouched in pool2.run(load_other, hf_dir, config, good[0], **TWO):
        assert untouched and message in error


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"pp": 2}], ids=["tp2", "pp2"])
def test_another_base_is_refused(pool2, good, tmp_path, sizes):
    """One of the same shapes; one that is larger."""
    common = {"num_layers": 4, "num_heads": 8, "num_kv_heads": 2, "head_dim": 12}
    same_shape = make_tiny(tmp_path / "same", "qwen3", ffn=80, seed=5, **common)
    larger = make_tiny(tmp_path / "larger", "qwen3", ffn=96, **common)
    for error, untouched in pool2.run(load_other, same_shape, CONFIG, good[0], **sizes):
        assert untouched and "base weights differ in 4 of 4 layers" in error
    for error, untouched in pool2.run(load_other, larger, CONFIG, good[0], **sizes):
        assert untouched and "linear_fc1.lora_B.gate_proj is [80, 3] in the checkpoint, [96, 3] here" in error


def missing_adapters(layout: Layout, hf_dir, path, out):
    run = Run(layout, hf_dir, LoRAConfig(rank=3, alpha=12, target_modules=("linear_qkv",)))
    run.start()
    save_adapter(run.model, out, optimizer=run.optimizer, step=1)
    save_adapter(run.model, path / "weights", step=1)
    return load_other(layout, hf_dir, CONFIG, out), load_weights_only(layout, hf_dir, path / "weights")


def load_weights_only(layout: Layout, hf_dir, path):
    config = LoRAConfig(rank=3, alpha=12, target_modules=("linear_qkv",))
    strict = load_other(layout, hf_dir, config, path)[0]
    run = Run(layout, hf_dir, config)
    no_scheduler = None
    loaded = load_adapter(run.model, path, optimizer=run.optimizer, fresh_optimizer=True)
    try:
        load_adapter(run.model, path, optimizer=run.optimizer, fresh_optimizer=True, scheduler=run.scheduler)
    except ValueError as raised:
        no_scheduler = str(raised)
    return strict, no_scheduler, (loaded.optimizer, loaded.scheduler, loaded.rng)


def test_missing_parts_are_refused(pool2, hf_dir, tmp_path):
    for (missing, untouched), weights in pool2.run(missing_adapters, hf_dir, tmp_path, tmp_path / "qkv", **TWO):
        assert untouched and "the checkpoint has no adapter for decoder.layers.0.self_attention.linear_proj" in missing
        strict, no_scheduler, loaded = weights
        assert "holds no optimizer state; load with fresh_optimizer=True" in strict
        assert "holds no scheduler state" in no_scheduler
        assert loaded == (False, False, True)


def masters_follow(layout: Layout, hf_dir, path, bf16):
    """Hazard 9: with a learning rate of 0 a step must not move the adapters that were loaded."""
    run = Run(layout, hf_dir, CONFIG, bf16=bf16)
    run.train(0, 2)
    load_adapter(run.model, path, optimizer=run.optimizer, fresh_optimizer=True)
    for group in run.optimizer.param_groups:
        group["lr"] = group["max_lr"] = group["min_lr"] = 0.0
    before = runs.whole(run.model)
    tokens = torch.randint(4, 128, (4, 17), generator=torch.Generator().manual_seed(3))
    adapted.train_step(run.model, run.optimizer, tokens, microbatches=2)
    after = runs.whole(run.model)
    moments = [v for _, values in runs.states_of(run.optimizer) for k, v in values.items() if k != "param"]
    return all(torch.equal(before[key], after[key]) for key in before), before, len(moments) > 0


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_masters_follow_loaded_weights(pool2, hf_dir, good, bf16):
    results = pool2.run(masters_follow, hf_dir, good[0], bf16, **TWO)
    assert all(same for same, _, _ in results)


def refused_saves(layout: Layout, hf_dir, path):
    """Errors of saves that would lie."""
    errors = []

    def attempt(**kwargs):
        try:
            save_adapter(step=1, path=path, **kwargs)
        except ValueError as raised:
            errors.append(str(raised))

    run = Run(layout, hf_dir, CONFIG)
    linear = next(iter_adapters(run.model))
    if adapted.mpu.get_tensor_model_parallel_rank() == 1:
        linear.lora_B.data[0, 0] = float("nan")
    attempt(model=run.model, optimizer=run.optimizer)
    attempt(model=Run(layout, hf_dir, CONFIG).model, optimizer=run.optimizer)
    chunks = adapted.adapted_chunks(hf_dir, CONFIG, freeze_base=False)
    attempt(model=adapted.wrap(chunks))
    linear.lora_B.data[0, 0] = 0.0
    run.scheduler.state_dict = lambda: {"function": print, "lr": 1.0}
    attempt(model=run.model, scheduler=run.scheduler)
    return errors


def test_saves_that_would_lie_are_refused(pool2, hf_dir, tmp_path):
    """NaN on one rank alone; a foreign optimizer; a base that trains; a scheduler that is no data."""
    first, second = pool2.run(refused_saves, hf_dir, tmp_path / "run", **TWO)
    assert first == second and len(first) == 4
    assert "decoder.layers.0.self_attention.linear_proj.lora_B.o_proj is not finite" in first[0]
    assert "does not train" in first[1]
    assert "train too" in first[2]
    assert "more than numbers" in first[3]
    assert not (tmp_path / "run").exists()


def test_no_checkpoint_there(pool2, hf_dir, tmp_path):
    for error, untouched in pool2.run(load_other, hf_dir, CONFIG, tmp_path / "nothing", **TWO):
        assert untouched and "is no adapter checkpoint" in error


def test_readable_manifest(good):
    """``adapter.json`` says what it is, to people and to other programs."""
    manifest = json.loads((good[0] / "iter_0000002" / "adapter.json").read_text())
    assert manifest["format"] == "slime-lora adapter" and manifest["step"] == 2
    assert LoRAConfig(**manifest["config"]) == CONFIG
    assert manifest["adapters"]["decoder.layers.3.mlp.linear_fc1"]["projections"] == ["gate_proj", "up_proj"]
    assert manifest["base"]["architecture"]["hidden_size"] == 64 and len(manifest["base"]["layers"]) == 4
    assert manifest["optimizer"] == {"states": ["exp_avg", "exp_avg_sq"], "scalars": {"step": 2.0}}
    assert manifest["parallelism"] == {"world": 2, "tp": 2, "pp": 1, "cp": 1, "ep": 1}
