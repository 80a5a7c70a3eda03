"""Adapter directories: nothing bad is written, nothing damaged is read, a crash leaves the old one.

Run: python -m pytest tests/peft/test_peft_files.py
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
from safetensors.torch import load_file, save_file

from slime_plugins.lora.files import atomic
from slime_plugins.lora.peft import directory as peft_files
from slime_plugins.lora.peft.config import (
    is_target,
    key_of,
    module_alpha,
    module_rank,
    module_scaling,
    parse_key,
    target_list,
)
from slime_plugins.lora.peft.directory import read_adapter, validate_adapter, write_adapter

Q0_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q0_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.fixture
def written(tmp_path):
    config, tensors = adapter_dirs.adapter()
    write_adapter(tmp_path / "adapter", config, tensors)
    return tmp_path / "adapter", config, tensors


def assert_equal(found, expected):
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key


def load(directory):
    """As every consumer loads: read, judge, take all tensors."""
    config, tensors = read_adapter(directory)
    validate_adapter(config, tensors)
    return config, {key: tensors[key] for key in tensors}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_is_bit_equal(tmp_path, dtype):
    config, tensors = adapter_dirs.adapter(dtype=dtype)
    write_adapter(tmp_path / "a", config, tensors)
    found_config, found = load(tmp_path / "a")
    assert found_config == config
    assert_equal(found, tensors)
    assert sorted(os.listdir(tmp_path)) == ["a"]
    assert sorted(os.listdir(tmp_path / "a")) == ["adapter_config.json", "adapter_model.safetensors"]


def test_other_readers_see_plain_safetensors(written):
    directory, _, tensors = written
    assert_equal(load_file(directory / "adapter_model.safetensors"), tensors)


def test_peft_loads_it_without_a_missing_or_unexpected_key(tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    linears = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    adapter_config, tensors = adapter_dirs.adapter(linears)
    write_adapter(tmp_path / "a", adapter_config, tensors)
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "a")
    live = {key.replace(".default", ""): value for key, value in wrapped.state_dict().items() if "lora_" in key}
    assert_equal(live, tensors)


def test_bin_is_read_and_its_bytes_are_checked(tmp_path):
    config, tensors = adapter_dirs.adapter()
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    path = tmp_path / "adapter_model.bin"
    torch.save({key.replace(".weight", ".default.weight"): value for key, value in tensors.items()}, path)
    _, found = read_adapter(tmp_path)
    assert {key.replace(".default", "") for key in found} == set(tensors)
    assert {parse_key(key) for key in found} == {parse_key(key) for key in tensors}

    torch.save(tensors, path)
    assert_equal(load(tmp_path)[1], tensors)
    data = bytearray(path.read_bytes())
    at = data.index(tensors[Q0_A].numpy().tobytes())
    data[at + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="checksum mismatch"):
        load(tmp_path)


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_pickled_code_in_a_bin_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, tensors = adapter_dirs.adapter()
    Path("adapter_config.json").write_text(json.dumps(config))
    torch.save({**tensors, "evil": RunsCode()}, "adapter_model.bin")
    with pytest.raises(ValueError, match=r"refused, loading it would call .*system"):
        read_adapter(".")
    assert not Path("executed").exists()


def spoil_empty(config, tensors):
    tensors.clear()


def spoil_zero_size(config, tensors):
    tensors[Q0_A] = torch.empty(0)


def spoil_nan(config, tensors):
    tensors[Q0_B][1, 1] = float("nan")


def spoil_inf(config, tensors):
    tensors[Q0_B][1, 1], tensors[Q0_B][0, 0] = float("inf"), float("-inf")


def spoil_half(config, tensors):
    del tensors[Q0_B]


def spoil_rank(config, tensors):
    config["r"] = 4


def spoil_one_rank(config, tensors):
    tensors[Q0_A], tensors[Q0_B] = torch.ones(2, 8), torch.ones(10, 2)


def spoil_dtype(config, tensors):
    tensors[Q0_A] = tensors[Q0_A].bfloat16()


def spoil_integers(config, tensors):
    tensors[Q0_A] = tensors[Q0_A].int()


def spoil_target(config, tensors):
    config["target_modules"].remove("q_proj")


def spoil_absent_target(config, tensors):
    config["target_modules"].append("r_proj")


def spoil_name(config, tensors):
    tensors[Q0_A.removeprefix("base_model.model.")] = tensors.pop(Q0_A)


def spoil_live_name(config, tensors):
    tensors[Q0_A.replace(".weight", ".default.weight")] = tensors.pop(Q0_A)


def spoil_alpha(config, tensors):
    config["lora_alpha"] = 0


def spoil_type(config, tensors):
    config["peft_type"] = "IA3"


SPOILED = [
    (spoil_empty, "no tensor at all"),
    (spoil_zero_size, rf"{Q0_A} has shape \[0\].*convert-zero"),
    (spoil_nan, f"{Q0_B} has 1 of 30 values that are not finite"),
    (spoil_inf, f"{Q0_B} has 2 of 30 values that are not finite"),
    (spoil_half, f"{Q0_A} has no lora_B"),
    (spoil_rank, r"lora_A.weight has shape \[3, 8\], rank 3, where adapter_config.json says rank 4 \(and 27 more"),
    (spoil_one_rank, rf"{Q0_A} has shape \[2, 8\], rank 2"),
    (spoil_dtype, f"{Q0_A} is bfloat16 where the others are float32"),
    (spoil_integers, f"{Q0_A} is int32"),
    (spoil_target, f"{Q0_A} is not selected by target_modules"),
    (spoil_absent_target, "target_modules names 'r_proj'"),
    (spoil_name, "model.layers.0.self_attn.q_proj.lora_A.weight is not a lora_A"),
    (spoil_live_name, "has an adapter's name in it, as 1 keys have"),
    (spoil_alpha, "lora_alpha is 0, expected a number above 0"),
    (spoil_type, "peft_type is 'IA3', expected 'LORA'"),
]


@pytest.mark.parametrize("spoil, message", SPOILED, ids=[spoil.__name__ for spoil, _ in SPOILED])
def test_a_bad_adapter_is_not_written(tmp_path, spoil, message):
    config, tensors = adapter_dirs.adapter()
    spoil(config, tensors)
    with pytest.raises(ValueError, match=message) as error:
        write_adapter(tmp_path / "a", config, tensors)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []


def test_shared_storage_is_copied(tmp_path):
    config, tensors = adapter_dirs.adapter()
    fused = torch.randn(3, 8)
    for leaf in ("q_proj", "k_proj", "v_proj"):
        tensors[key_of(f"model.layers.0.self_attn.{leaf}", "A")] = fused
    rows = torch.randn(30, 3)
    tensors[Q0_B] = rows[5:15]
    write_adapter(tmp_path / "a", config, tensors)
    assert_equal(load(tmp_path / "a")[1], tensors)


def test_overwriting_replaces_the_adapter_and_keeps_other_files(written):
    directory, config, _ = written
    (directory / "README.md").write_text("mine")
    (directory / "adapter_model.bin").write_text("stale: readers may prefer it")
    (directory / "runs").mkdir()
    (directory / "runs" / "log").write_text("mine too")
    (directory / "tokenizer.json").symlink_to("/nowhere")
    _, other = adapter_dirs.adapter(seed=1)
    write_adapter(directory, config, other)
    assert_equal(load(directory)[1], other)
    assert (directory / "README.md").read_text() == "mine"
    assert (directory / "runs" / "log").read_text() == "mine too"
    assert os.readlink(directory / "tokenizer.json") == "/nowhere"
    assert not (directory / "adapter_model.bin").exists()
    assert os.listdir(directory.parent) == ["adapter"]


def test_overwriting_without_exchange(written, monkeypatch):
    monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    directory, config, _ = written
    _, other = adapter_dirs.adapter(seed=1)
    write_adapter(directory, config, other)
    assert_equal(load(directory)[1], other)
    assert os.listdir(directory.parent) == ["adapter"]


def test_a_directory_that_is_no_adapter_is_not_overwritten(tmp_path):
    config, tensors = adapter_dirs.adapter()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="not an adapter, not overwritten"):
        write_adapter(tmp_path / "home", config, tensors)
    assert os.listdir(tmp_path / "home") == ["thesis.tex"]
    with pytest.raises(ValueError, match="is a file"):
        write_adapter(tmp_path / "home" / "thesis.tex", config, tensors)
    (tmp_path / "empty").mkdir()
    write_adapter(tmp_path / "empty", config, tensors)
    assert_equal(load(tmp_path / "empty")[1], tensors)


def test_a_failing_write_leaves_the_old_adapter(written, monkeypatch):
    directory, config, tensors = written
    _, other = adapter_dirs.adapter(seed=1)

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_adapter(directory, config, other)
    assert_equal(load(directory)[1], tensors)
    assert os.listdir(directory.parent) == ["adapter"]


KILLED = """
import os, shutil, sys
import adapter_dirs
from slime_plugins.lora.files import atomic
from slime_plugins.lora.peft import directory as peft_files

config, tensors = adapter_dirs.adapter(seed=1)
if sys.argv[2] == "renames":
    atomic._exchange = lambda a, b: False
left = 0
def dying(call):
    def run(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return call(*args, **kwargs)
    return run
for name in ("mkdir", "rename", "fsync", "link"):
    setattr(os, name, dying(getattr(os, name)))
code = 9
steps = 0
while code == 9:
    left = 1000
    shutil.copytree("adapter", f"{steps}/adapter")
    left = steps
    if not os.fork():
        peft_files.write_adapter(f"{steps}/adapter", config, tensors)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.wait()[1])
    steps += 1
sys.exit(code)
"""


@pytest.mark.parametrize("how", ["exchange", "renames"])
def test_killed_at_every_step_leaves_one_whole_adapter(tmp_path, how):
    """A process ends, without clean-up, before its n-th file system call, for every n until the write succeeds."""
    config, old = adapter_dirs.adapter()
    _, new = adapter_dirs.adapter(seed=1)
    write_adapter(tmp_path / "adapter", config, old)
    (tmp_path / "adapter" / "README.md").write_text("mine")
    environment = {**os.environ, "PYTHONPATH": str(Path(adapter_dirs.__file__).parent)}
    subprocess.run([sys.executable, "-c", KILLED, "", how], env=environment, cwd=tmp_path, check=True)
    seen = []
    for step in range(len(os.listdir(tmp_path)) - 1):
        here = tmp_path / str(step)
        if how == "renames" and not (here / "adapter").exists():  # between two renames: the next write mends it
            seen.append("gone")
        else:
            found = load(here / "adapter")[1]
            seen.append("new" if torch.equal(found[Q0_A], new[Q0_A]) else "old")
            assert_equal(found, new if seen[-1] == "new" else old)
        write_adapter(here / "adapter", config, old)
        assert_equal(load(here / "adapter")[1], old)
        assert (here / "adapter" / "README.md").read_text() == "mine"
        assert os.listdir(here) == ["adapter"], "leftovers of the killed writer"
    assert len(seen) > 5
    assert list(dict.fromkeys(seen)) == (["old", "new"] if how == "exchange" else ["old", "gone", "new"])


FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.mark.parametrize("name", FILES)
def test_fault_deleted_or_truncated(written, name):
    directory, _, _ = written
    whole = (directory / name).read_bytes()
    for size in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        (directory / name).write_bytes(whole[:size])
        if name == FILES[0] and size == len(whole) - 1:
            continue  # the newline at the end
        with pytest.raises(ValueError) as error:
            load(directory)
        assert "\n" not in str(error.value)
        assert name in str(error.value)
    (directory / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load(directory)


@pytest.mark.parametrize("name", FILES)
def test_fault_one_byte_flipped(written, name):
    """Any flipped byte: an error of one line, or what is loaded is exactly what was written."""
    directory, config, tensors = written
    whole = (directory / name).read_bytes()
    flips = [(position, bit) for position in range(len(whole)) for bit in range(8)]
    if name == FILES[1]:
        flips = sorted(random.Random(0).sample(flips, 400))
    messages = []
    for position, bit in flips:
        data = bytearray(whole)
        data[position] ^= 1 << bit
        (directory / name).write_bytes(data)
        try:
            found_config, found = load(directory)
        except (ValueError, OSError) as error:
            messages.append(str(error))
            continue
        assert_equal(found, tensors)
        for field in ("r", "lora_alpha", "target_modules", "bias", "peft_type"):
            assert found_config.get(field, "none") == config[field], (position, bit, field)
    assert len(messages) > len(flips) // 2
    assert not [message for message in messages if "\n" in message]


@pytest.mark.parametrize("name", FILES)
def test_fault_replaced_by_another_runs(written, tmp_path, name):
    directory, _, _ = written
    other_config, other = adapter_dirs.adapter(seed=1)
    other_config["lora_alpha"] *= 2
    write_adapter(tmp_path / "other", other_config, other)
    shutil.copy(tmp_path / "other" / name, directory / name)
    with pytest.raises(ValueError, match=r"lora_alpha is .* one of the two files is damaged or from another adapter"):
        load(directory)


def test_tensor_data_that_was_edited_is_named(written):
    directory, _, tensors = written
    from safetensors import safe_open

    with safe_open(directory / FILES[1], "pt") as file:
        metadata = file.metadata()
    tensors[Q0_B][2, 2] += 1
    save_file(tensors, directory / FILES[1], metadata)
    with pytest.raises(ValueError, match=f"{Q0_B}: checksum mismatch"):
        load(directory)


def test_a_git_lfs_pointer_says_so(written):
    directory, _, _ = written
    (directory / FILES[1]).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        load(directory)


def test_names():
    assert parse_key(key_of("a.b", "A")) == ("a.b", "A")
    assert parse_key("base_model.model.a.b.lora_B.default.weight") == ("a.b", "B")
    assert parse_key("base_model.model.a.b.lora_C.weight") is None
    assert parse_key("a.b.lora_A.weight") is None
    assert parse_key("base_model.model.a.b.lora_A.weight.extra") is None


def test_targets_ranks_and_scales_are_pefts():
    """Against PEFT's own functions, over configs with every field that chooses modules or ranks."""
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    names = [f"model.layers.{i}.{leaf}" for i in range(12) for leaf in adapter_dirs.SHAPES] + ["lm_head"]
    configs = [
        {"target_modules": ["q_proj", "mlp.up_proj"]},
        {"target_modules": ["proj"]},
        {"target_modules": r".*\.layers\.[13]\..*_proj"},
        {"target_modules": ["model.layers.1.mlp.up_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.v_proj"]},
        {"target_modules": ["q_proj", "lm_head"], "exclude_modules": r".*\.1\..*"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 11]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": ["h", "layers"]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": ["h"]},
        {
            "target_modules": ["q_proj", "k_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 5, "k_proj": 7, r"layers\.\d\.self_attn.k_proj": 9},
            "alpha_pattern": {"^model.layers.2.*": 11, "proj": 12},
            "use_rslora": True,
        },
    ]
    for options in configs:
        config = {"r": 4, "lora_alpha": 8, **options}
        theirs = peft.LoraConfig(**config)
        for name in names:
            assert is_target(config, name) == bool(check_target_module_exists(theirs, name)), (options, name)
            rank = theirs.rank_pattern.get(get_pattern_key(theirs.rank_pattern, name), theirs.r)
            alpha = theirs.alpha_pattern.get(get_pattern_key(theirs.alpha_pattern, name), theirs.lora_alpha)
            assert (module_rank(config, name), module_alpha(config, name)) == (rank, alpha)
            assert module_scaling(config, name) == alpha / (rank**0.5 if theirs.use_rslora else rank)


def test_target_list_selects_exactly():
    base = [f"model.layers.{i}.{leaf}" for i in range(3) for leaf in adapter_dirs.SHAPES]
    adapted = [name for name in base if name.endswith("q_proj") or name == "model.layers.1.mlp.up_proj"]
    targets = target_list(adapted, base)
    assert targets == ["model.layers.1.mlp.up_proj", "q_proj"]
    assert [name for name in base if is_target({"target_modules": targets}, name)] == adapted


def test_checks_see_the_bytes_they_were_given(written):
    """The checksum covers dtype and shape, not the bytes alone."""
    tensor = torch.arange(6.0)
    assert peft_files.digest(tensor) != peft_files.digest(tensor.reshape(2, 3))
    assert peft_files.digest(tensor) != peft_files.digest(tensor.view(torch.int32))
    assert peft_files.digest(tensor) == peft_files.digest(torch.stack([tensor, tensor], 1)[:, 0])
