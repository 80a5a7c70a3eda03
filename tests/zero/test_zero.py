"""``convert-zero`` on files in DeepSpeed's layout: the merge rule, names, configs, faults, hostile files, memory.

Run: python -m pytest tests/zero/test_zero.py        (DeepSpeed's own files: tests/zero/test_convert_zero.py)
"""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import adapter_dirs
import pytest
import torch
import zero_checkpoints
from safetensors.torch import load_file
from zero_checkpoints import PREFIX, TAG, Zero, trained

from slime_plugins.lora.cli import main
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.peft.directory import read_adapter
from slime_plugins.lora.peft.extra import extra_of
from slime_plugins.lora.peft.verify import verify_adapter
from slime_plugins.lora.zero.convert import convert_zero
from slime_plugins.lora.zero.files import ZeroCheckpoint

CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "some/base",
    "r": 5,
    "lora_alpha": 10,
    "target_modules": ["q_proj", "up_proj"],
    "modules_to_save": None,
}
LEAVES = ("self_attn.q_proj", "mlp.up_proj")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def plain(tensors):
    return {f"{PREFIX}{key.partition(PREFIX)[2]}".replace(".default", ""): value for key, value in tensors.items()}


def assert_equal(found, expected):
    assert set(found) == set(expected)
    for key in expected:
        assert found[key].dtype == expected[key].dtype
        assert torch.equal(found[key], expected[key]), key


def two_groups(tensors):
    B = {name: value for name, value in tensors.items() if "lora_B" in name}
    return [B, {name: value for name, value in tensors.items() if name not in B}]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_masters_are_joined_bit_for_bit(tmp_path, stage, ranks, dtype):
    tensors = trained()
    for groups in ([tensors], two_groups(tensors)):
        directory = tmp_path / str(len(groups))
        Zero(groups, stage, ranks, dtype).write(directory, CONFIG)
        checkpoint = ZeroCheckpoint(directory)
        assert (checkpoint.stage, checkpoint.world_size, checkpoint.source) == (stage, ranks, "fp32 masters")
        assert_equal(checkpoint, tensors)
        done = convert_zero(directory, directory / "out")
        assert done.report.ok
        assert_equal(read_adapter(directory / "out")[1], plain(tensors))


def test_sub_groups_of_stage_3(tmp_path):
    """DeepSpeed cuts the flat tensors at sub_group_size; a parameter may lie across the cut."""
    tensors = trained()
    Zero(two_groups(tensors), 3, 2, sub_group=9).write(tmp_path / "c")
    assert_equal(ZeroCheckpoint(tmp_path / "c"), tensors)


def test_paddings_after_each_parameter(tmp_path):
    tensors = trained()
    paddings = [[i % 3 for i in range(len(tensors))]]
    Zero([tensors], 2, 2, paddings=paddings).write(tmp_path / "c")
    assert_equal(ZeroCheckpoint(tmp_path / "c"), tensors)


def test_ranks_are_sorted_as_numbers(tmp_path):
    tensors = trained()
    for stage in (1, 3):
        Zero([tensors], stage, 12).write(tmp_path / str(stage))
        assert_equal(ZeroCheckpoint(tmp_path / str(stage)), tensors)


@pytest.mark.parametrize("stage", [2, 3])
def test_frozen_parameters_left_out(tmp_path, stage):
    tensors = trained()
    Zero([tensors], stage, frozen=None).write(tmp_path / "c", CONFIG)
    convert_zero(tmp_path / "c", tmp_path / "out")
    assert_equal(read_adapter(tmp_path / "out")[1], plain(tensors))


@pytest.mark.parametrize(
    "prefix",
    ["base_model.model.", "base_model.base_model.model.", "module.base_model.model.", "backbone.base_model.model."],
)
def test_prefixes_of_wrappers(tmp_path, prefix):
    tensors = trained(prefix=prefix)
    Zero([tensors], frozen=zero_checkpoints.frozen(prefix=prefix)).write(tmp_path / "c")
    convert_zero(tmp_path / "c", tmp_path / "out", alpha=10)
    config, found = read_adapter(tmp_path / "out")
    assert_equal(found, plain(tensors))
    assert config["target_modules"] == ["q_proj", "up_proj"]


def test_names_without_wrapper_or_adapter_name(tmp_path):
    """transformers' model.add_adapter puts adapters in without PEFT's wrapper; older files have no adapter name."""
    tensors = trained()
    bare = {name.removeprefix(PREFIX): value for name, value in tensors.items()}
    unnamed = {name.replace(".default", ""): value for name, value in tensors.items()}
    for i, names in enumerate((bare, unnamed)):
        Zero([names]).write(tmp_path / str(i))
        convert_zero(tmp_path / str(i), tmp_path / f"out{i}", alpha=10)
        assert_equal(read_adapter(tmp_path / f"out{i}")[1], plain(tensors))


def test_dtype(tmp_path):
    tensors = trained()
    Zero([tensors]).write(tmp_path / "c", CONFIG)
    convert_zero(tmp_path / "c", tmp_path / "out", dtype=BF16)
    assert_equal(read_adapter(tmp_path / "out")[1], plain({key: value.bfloat16() for key, value in tensors.items()}))


def test_tags(tmp_path):
    first, second = trained(), trained(seed=1)
    Zero([first]).write(tmp_path / "c")
    Zero([second]).write(tmp_path / "d")
    shutil.move(tmp_path / "d" / TAG, tmp_path / "c" / "global_step9")
    assert_equal(ZeroCheckpoint(tmp_path / "c"), first)
    assert_equal(ZeroCheckpoint(tmp_path / "c", "global_step9"), second)
    assert_equal(ZeroCheckpoint(tmp_path / "c" / "global_step9"), second)
    with pytest.raises(UsageError, match=f"no checkpoint with tag 'global_step8'; there is: {TAG}, global_step9"):
        ZeroCheckpoint(tmp_path / "c", "global_step8")
    (tmp_path / "c" / "latest").unlink()
    with pytest.raises(UsageError, match=f"choose one with --tag: {TAG}, global_step9"):
        ZeroCheckpoint(tmp_path / "c")
    (tmp_path / "c" / "latest").write_text("../../elsewhere")
    with pytest.raises(UsageError, match="no checkpoint with tag"):
        ZeroCheckpoint(tmp_path / "c")


def test_config_is_taken_from_the_checkpoint_and_checked(tmp_path):
    Zero([trained()]).write(tmp_path / "c", {**CONFIG, "use_rslora": True})
    convert_zero(tmp_path / "c", tmp_path / "out")
    config, _ = read_adapter(tmp_path / "out")
    assert (config["lora_alpha"], config["use_rslora"], config["inference_mode"]) == (10, True, True)
    for change, message in (
        ({"r": 6}, "says rank 6"),
        ({"target_modules": ["q_proj"]}, "not selected by target_modules"),
    ):
        (tmp_path / "c" / "adapter_config.json").write_text(json.dumps({**CONFIG, **change}))
        with pytest.raises(ValueError, match=message):
            convert_zero(tmp_path / "c", tmp_path / "out2")
    stale = {**CONFIG, "target_modules": [*CONFIG["target_modules"], "c_attn"]}
    (tmp_path / "c" / "adapter_config.json").write_text(json.dumps(stale))
    convert_zero(tmp_path / "c", tmp_path / "out")
    assert read_adapter(tmp_path / "out")[0]["target_modules"] == ["q_proj", "up_proj"]
    (tmp_path / "c" / "adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UsageError, match=r"--lora-alpha is 11, but .* has 10"):
        convert_zero(tmp_path / "c", tmp_path / "out2", alpha=11)
    assert not (tmp_path / "out2").exists()


def test_config_is_inferred(tmp_path):
    Zero([trained()]).write(tmp_path / "c")
    with pytest.raises(UsageError, match="give the run's alpha with --lora-alpha"):
        convert_zero(tmp_path / "c", tmp_path / "out")
    convert_zero(tmp_path / "c", tmp_path / "out", alpha=20, base_model="org/name")
    config, _ = read_adapter(tmp_path / "out")
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (5, 20, "org/name")
    assert config["target_modules"] == ["q_proj", "up_proj"]

    # up_proj in one layer only: its leaf name would select a module that was never adapted
    partial = {name: value for name, value in trained().items() if "layers.1.mlp" not in name}
    for i, frozen in enumerate((zero_checkpoints.frozen(), None)):
        Zero([partial], frozen=frozen).write(tmp_path / str(i))
        convert_zero(tmp_path / str(i), tmp_path / f"out{i}", alpha=20)
        assert read_adapter(tmp_path / f"out{i}")[0]["target_modules"] == ["model.layers.0.mlp.up_proj", "q_proj"]


def test_mixed_ranks_are_inferred_as_a_pattern(tmp_path):
    tensors = {**trained(), **trained(rank=3, leaves=("mlp.gate_proj",), layers=1)}
    Zero([tensors]).write(tmp_path / "c")
    convert_zero(tmp_path / "c", tmp_path / "out", alpha=20)
    config, found = read_adapter(tmp_path / "out")
    assert config["rank_pattern"] == {"model.layers.0.mlp.gate_proj": 3}
    assert_equal(found, plain(tensors))


def test_other_trained_modules_are_listed_and_saved_beside(tmp_path, capsys):
    extras = {
        f"{PREFIX}score.modules_to_save.default.weight": torch.randn(1, 7),
        f"{PREFIX}model.embed_tokens.weight": torch.randn(9, 7),
        "v_head.summary.bias": torch.randn(1),
    }
    Zero([trained(), extras], 2).write(tmp_path / "c", {**CONFIG, "modules_to_save": ["score"]})
    assert main(["convert-zero", str(tmp_path / "c"), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert f"3 tensors beside the adapter, saved to {tmp_path / 'out' / 'extra' / 'extra.safetensors'}:" in out
    assert all(name in out for name in extras)
    expected = dict(zip(("score.weight", "model.embed_tokens.weight", "v_head.summary.bias"), extras.values()))
    assert_equal(extra_of(tmp_path / "out"), expected)
    assert set(verify_adapter(tmp_path / "out").extra) == set(expected)
    config, found = read_adapter(tmp_path / "out")
    assert config["modules_to_save"] is None
    assert_equal(found, plain(trained()))
    for place, file in (("x.safetensors", "x.safetensors"), ("x", "x/extra.safetensors")):
        arguments = ["convert-zero", str(tmp_path / "c"), "--out", str(tmp_path / "out"), "--force"]
        assert main([*arguments, "--extra", str(tmp_path / place)]) == 0
        saved = load_file(tmp_path / file)
        assert_equal(saved, expected)
        assert not (tmp_path / "out" / "extra").exists(), "of the adapter that was replaced"


def test_several_adapters(tmp_path):
    default = trained()
    policy = {name.replace("default", "policy"): value for name, value in trained(seed=1).items()}
    Zero([{**default, **policy}]).write(tmp_path / "c", CONFIG)
    with pytest.raises(UsageError, match="choose one with --adapter: default, policy"):
        convert_zero(tmp_path / "c", tmp_path / "out")
    with pytest.raises(UsageError, match="no adapter 'x' was trained; there is: default, policy"):
        convert_zero(tmp_path / "c", tmp_path / "out", adapter="x")
    done = convert_zero(tmp_path / "c", tmp_path / "out", adapter="policy")
    assert_equal(read_adapter(tmp_path / "out")[1], plain(trained(seed=1)))
    assert set(done.others) == set(default)


@pytest.mark.parametrize(
    "name",
    ["q_proj.lora_magnitude_vector.default.weight", "embed_tokens.lora_embedding_A.default", "q.lora_C.default"],
)
def test_what_is_more_than_lora_is_refused_by_name(tmp_path, name):
    Zero([{**trained(), f"{PREFIX}model.{name}": torch.randn(3)}]).write(tmp_path / "c", CONFIG)
    with pytest.raises(ValueError, match=name):
        convert_zero(tmp_path / "c", tmp_path / "out")


def test_no_adapter_in_the_checkpoint(tmp_path):
    Zero([{"model.layers.0.mlp.up_proj.weight": torch.randn(3, 4)}]).write(tmp_path / "c")
    with pytest.raises(ValueError, match=r"no LoRA among the 1 trained parameters, the first is model.layers.0.mlp"):
        convert_zero(tmp_path / "c", tmp_path / "out", alpha=1)


def test_never_trained_and_not_finite_are_not_written(tmp_path):
    zero = {name: value * ("lora_B" not in name) for name, value in trained().items()}
    Zero([zero]).write(tmp_path / "zero", CONFIG)
    with pytest.raises(ValueError, match="never trained"):
        convert_zero(tmp_path / "zero", tmp_path / "out")
    nan = trained()
    next(iter(nan.values()))[1, 1] = float("nan")
    Zero([nan]).write(tmp_path / "nan", CONFIG)
    with pytest.raises(ValueError, match=r"0.self_attn.q_proj.lora_A.weight has 1 of 35 values that are not finite"):
        convert_zero(tmp_path / "nan", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["nan", "zero"]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_without_optimizer_files_the_models_weights_stand_in(tmp_path, stage):
    tensors = trained()
    Zero([tensors], stage).write(tmp_path / "c", CONFIG)
    for path in (tmp_path / "c" / TAG).glob("*_optim_states.pt"):
        path.unlink()
    done = convert_zero(tmp_path / "c", tmp_path / "out")
    assert done.source == "the model's bfloat16 weights (there is no *_optim_states.pt)"
    assert_equal(read_adapter(tmp_path / "out")[1], plain({key: value.bfloat16() for key, value in tensors.items()}))


def test_checked_against_a_local_base(tmp_path):
    import adapter_dirs

    Zero([trained()]).write(tmp_path / "c", CONFIG)
    linears = {
        f"model.layers.{layer}.{leaf}": shape
        for layer in range(2)
        for leaf, shape in (("self_attn.q_proj", (11, 7)), ("mlp.up_proj", (12, 8)), ("mlp.down_proj", (7, 12)))
    }
    base = adapter_dirs.base_checkpoint(tmp_path / "base", linears)
    done = convert_zero(tmp_path / "c", tmp_path / "out", base_model=str(base))
    assert done.report.expected_modules == 4
    other = adapter_dirs.base_checkpoint(tmp_path / "other", {**linears, "model.layers.1.mlp.up_proj": (12, 9)})
    with pytest.raises(ValueError, match="where the base has 9 inputs"):
        convert_zero(tmp_path / "c", tmp_path / "out2", base_model=str(other))
    assert not (tmp_path / "out2").exists()


# --- faults -----------------------------------------------------------------------------------------------------


def outcome(directory, tensors):
    """The error of a conversion, or None when the adapter that came out is exactly the one that was trained."""
    try:
        convert_zero(directory, directory / "out")
    except (ValueError, OSError) as error:
        assert not (directory / "out").exists()
        return str(error)
    assert_equal(read_adapter(directory / "out")[1], plain(tensors))
    shutil.rmtree(directory / "out")
    return None


def rank_files(directory):
    return sorted((directory / TAG).glob("*_states.pt"))


@pytest.mark.parametrize("config", [CONFIG, None], ids=["config", "inferred"])
def test_names_of_an_older_transformers_become_those_of_its_modules(tmp_path, config):
    """Where a run saw Qwen2.5-VL's layers as ``model.layers``, PEFT would now find nothing to load."""
    linears = {f"model.layers.{n}.{leaf}": (11 + i, 7 + i) for n in (0, 1) for i, leaf in enumerate(LEAVES)}
    linears["visual.blocks.0.mlp.up_proj"] = (9, 5)
    about = {"model_type": "qwen2_5_vl", "num_hidden_layers": 2}
    base = adapter_dirs.base_checkpoint(tmp_path / "base", linears, config=json.dumps(about))
    Zero([trained()]).write(
        tmp_path / "c", config and {**config, "target_modules": f"model.layers.*({'|'.join(LEAVES)})"}
    )
    done = convert_zero(tmp_path / "c", tmp_path / "out", base_model=str(base), alpha=None if config else 10)
    assert done.report.ok
    tensors = read_adapter(tmp_path / "out")[1]
    assert_equal(
        tensors, {k.replace("model.layers", "model.language_model.layers"): v for k, v in plain(trained()).items()}
    )


@pytest.mark.parametrize("stage", [2, 3])
def test_fault_deleted(tmp_path, stage):
    tensors = trained()
    Zero([tensors], stage, 3).write(tmp_path / "c", CONFIG)
    files = rank_files(tmp_path / "c")
    assert len(files) == (4 if stage == 2 else 6)
    for path in files:
        content = path.read_bytes()
        path.unlink()
        error = outcome(tmp_path / "c", tensors)
        assert error is not None
        assert "\n" not in error
        expected = "no *_model_states.pt" if path.name == "mp_rank_00_model_states.pt" else f"{path.name} is missing"
        assert expected in error
        path.write_bytes(content)
    assert outcome(tmp_path / "c", tensors) is None


@pytest.mark.parametrize("stage", [2, 3])
def test_fault_truncated(tmp_path, stage):
    tensors = trained()
    Zero([tensors], stage).write(tmp_path / "c", CONFIG)
    for path in rank_files(tmp_path / "c"):
        content = path.read_bytes()
        for size in (0, 10, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:size])
            error = outcome(tmp_path / "c", tensors)
            assert error is not None
            assert str(path) in error
            assert "\n" not in error
        path.write_bytes(content)


@pytest.mark.parametrize("stage", [2, 3])
def test_fault_one_byte_flipped(tmp_path, stage):
    """Anywhere: an error, or the right adapter (a byte that is not used). In the masters: always an error."""
    tensors = trained(layers=1)
    zero = Zero([tensors], stage, frozen=zero_checkpoints.frozen(layers=1))
    zero.write(tmp_path / "c", CONFIG)
    chance = random.Random(0)
    for path in rank_files(tmp_path / "c"):
        content = path.read_bytes()
        positions = dict.fromkeys(chance.sample(range(len(content)), 60), False)
        if "optim" in path.name:
            rank = int(path.name.partition("pp_rank_")[2][0])
            masters = (zero._stage3 if stage == 3 else zero._stage2)(rank)[0].numpy().tobytes()
            start = content.index(masters)
            positions.update(dict.fromkeys(range(start, start + len(masters), 37), True))
        for position, is_master in positions.items():
            damaged = bytearray(content)
            damaged[position] ^= 1 << (position % 8)
            path.write_bytes(damaged)
            error = outcome(tmp_path / "c", tensors)
            assert error is None or "\n" not in error
            assert error is not None or not is_master
        path.write_bytes(content)


@pytest.mark.parametrize("stage", [1, 2])
def test_fault_rank_file_of_another_run_with_the_same_settings(tmp_path, stage):
    """The model's bf16 weights are in the checkpoint: masters that do not round to them are of another run."""
    tensors = trained()
    Zero([tensors], stage).write(tmp_path / "c", CONFIG)
    Zero([trained(seed=1)], stage).write(tmp_path / "d", CONFIG)
    for path in rank_files(tmp_path / "c"):
        content = path.read_bytes()
        shutil.copy(tmp_path / "d" / TAG / path.name, path)
        error = outcome(tmp_path / "c", tensors)
        assert error is not None
        assert "files of different runs or steps are mixed" in error
        path.write_bytes(content)


OTHER_RUNS = [{"step": 9}, {"lr": 1e-4}, {"ranks": 3}, {"groups": [trained(rank=6)]}]


@pytest.mark.parametrize("change", OTHER_RUNS, ids=lambda change: next(iter(change)))
def test_fault_rank_file_of_another_run_in_stage_3(tmp_path, change):
    """Stage 3 keeps no second copy: what tells runs apart is what the files say about themselves."""
    tensors = trained()
    Zero([tensors], 3).write(tmp_path / "c", CONFIG)
    Zero(**{"groups": [trained(seed=1)], "stage": 3, **change}).write(tmp_path / "d", CONFIG)
    for path in rank_files(tmp_path / "c"):
        content = path.read_bytes()
        shutil.copy(tmp_path / "d" / TAG / path.name, path)
        error = outcome(tmp_path / "c", tensors)
        assert error is not None
        assert "\n" not in error
        path.write_bytes(content)


def test_two_runs_in_one_directory(tmp_path):
    Zero([trained()], 3, 2).write(tmp_path / "c", CONFIG)
    Zero([trained(seed=1)], 3, 2, dtype=FP16).write(tmp_path / "d", CONFIG)
    for path in rank_files(tmp_path / "d"):
        if "optim" in path.name:
            shutil.copy(path, tmp_path / "c" / TAG)
    with pytest.raises(ValueError, match="two kinds, as two runs into one directory leave them"):
        ZeroCheckpoint(tmp_path / "c")


def test_more_ranks_than_the_run_had(tmp_path):
    Zero([trained()], 3, 2).write(tmp_path / "c")
    Zero([trained()], 3, 3).write(tmp_path / "d")
    for path in rank_files(tmp_path / "d"):
        if "rank_2" in path.name:
            shutil.copy(path, tmp_path / "c" / TAG)
    with pytest.raises(ValueError, match="is of another run"):
        ZeroCheckpoint(tmp_path / "c")


@pytest.mark.parametrize(
    "name, message",
    [
        ("zero_pp_rank_0_mp_rank_01_optim_states.pt", "model parallelism"),
        ("layer_0_expert_1_mp_rank_00_model_states.pt", "expert-parallel"),
        ("expp_rank_0_mp_rank_00_optim_states.pt", "expert-parallel"),
        ("layer_00-model_00-model_states.pt", "not a file that DeepSpeed ZeRO writes"),
    ],
)
def test_other_parallelisms_are_refused_by_name(tmp_path, name, message):
    Zero([trained()]).write(tmp_path / "c")
    (tmp_path / "c" / TAG / name).write_bytes(b"")
    with pytest.raises(ValueError, match=message) as error:
        ZeroCheckpoint(tmp_path / "c")
    assert name in str(error.value)


class RunsCode:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call, ("touch executed",)


@pytest.mark.parametrize("call", [os.system, eval, subprocess.check_output], ids=lambda call: call.__name__)
def test_pickled_code_is_refused_and_not_run(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    Zero([trained()]).write(tmp_path / "c", CONFIG)
    for path in rank_files(tmp_path / "c"):
        content = path.read_bytes()
        torch.save({"module": RunsCode(call), "optimizer_state_dict": {"loss_scaler": RunsCode(call)}}, path)
        with pytest.raises(ValueError, match=f"refused, loading it would call .*{call.__name__}") as error:
            convert_zero("c", "out")
        assert path.name in str(error.value)
        path.write_bytes(content)
    assert not Path("executed").exists()


def test_classes_of_deepspeed_are_not_imported(tmp_path):
    """They are named in every optimizer file; inert stand-ins take their place."""
    Zero([trained()]).write(tmp_path / "c", CONFIG)
    code = "import sys; from slime_plugins.lora.cli import main; main(sys.argv[1:]); "
    code += "assert 'deepspeed' not in sys.modules"
    command = [sys.executable, "-c", code, "convert-zero", str(tmp_path / "c"), "--out", str(tmp_path / "out")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert_equal(read_adapter(tmp_path / "out")[1], plain(trained()))


def test_without_checksums_in_the_file(tmp_path):
    """torch can be told not to compute them; then there is nothing to compare, and the files still convert."""
    torch.serialization.set_crc32_options(False)
    try:
        Zero([trained()]).write(tmp_path / "c", CONFIG)
    finally:
        torch.serialization.set_crc32_options(True)
    assert outcome(tmp_path / "c", trained()) is None


MEASURED = """
import re, sys
from pathlib import Path
from slime_plugins.lora.cli import main, verify
from slime_plugins.lora.zero import convert as zero
# Not getrusage: its peak is inherited from the parent through exec.
field = lambda name: int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = field("VmRSS")
assert main(["convert-zero", sys.argv[1], "--out", sys.argv[2]]) == 0
print(field("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux shows it")
@pytest.mark.parametrize("stage", [2, 3])
def test_memory_is_that_of_the_adapter_not_of_the_model(tmp_path, stage):
    """A 4 MiB adapter on a base of 200 MiB: converting takes less than 40 MiB more than importing the package."""
    tensors = {
        f"{PREFIX}model.layers.{i}.q_proj.lora_{half}.default.weight": torch.randn(shape)
        for i in range(8)
        for half, shape in (("A", (32, 2048)), ("B", (2048, 32)))
    }
    base = {f"{PREFIX}model.layers.{i}.q_proj.base_layer.weight": torch.zeros(5120, 5120) for i in range(4)}
    config = {**CONFIG, "r": 32, "target_modules": ["q_proj"]}
    Zero([tensors], stage, 2, frozen=base).write(tmp_path / "c", config)
    size = sum(path.stat().st_size for path in rank_files(tmp_path / "c"))
    assert size > 200 << 20
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "c"), str(tmp_path / "out")]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert float(out.splitlines()[-1]) < 40
    assert_equal(read_adapter(tmp_path / "out")[1], plain(tensors))


def test_command_line(tmp_path, capsys):
    Zero([trained()]).write(tmp_path / "c", CONFIG)
    out = str(tmp_path / "out")
    assert main(["convert-zero", str(tmp_path / "c"), "--out", out]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"checkpoint    {tmp_path / 'c' / TAG}: ZeRO stage 3, 2 ranks"
    assert lines[-2:] == ["ok", out]
    assert main(["convert-zero", str(tmp_path / "c"), "--out", out]) == 2
    assert "give --force" in capsys.readouterr().err
    assert main(["convert-zero", str(tmp_path / "c"), "--out", out, "--force", "--dtype", "bfloat16"]) == 0
    assert main(["convert-zero", str(tmp_path / "c"), "--out", str(tmp_path / "c"), "--force"]) == 2
    assert "is what CHECKPOINT_DIR names, which is read" in capsys.readouterr().err
    assert main(["convert-zero", str(tmp_path / "nowhere"), "--out", str(tmp_path / "o")]) == 2
    (tmp_path / "empty").mkdir()
    assert main(["convert-zero", str(tmp_path / "empty"), "--out", str(tmp_path / "o")]) == 2
    assert "not a DeepSpeed checkpoint, it has no file 'latest'" in capsys.readouterr().err
