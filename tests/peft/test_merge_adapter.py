"""``slime-lora merge``: PEFT's own merge bit for bit, in the memory of a matrix, whole or not at all.

pytest tests/peft/test_merge_adapter.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from adapter_dirs import adapter, base_checkpoint
from moe_models import make_checkpoint
from moe_reference import values_of, write_adapter
from peft_merged import merge_and_unload
from safetensors.torch import load_file, save_file

from slime_plugins.lora import cli
from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.base.fingerprint import weights_digest
from slime_plugins.lora.peft import directory
from slime_plugins.lora.peft.merge import merge_adapter
from slime_plugins.lora.rehearsal.tiny import make_tiny


def in_bfloat16(path):
    """The checkpoint with its matrices as they are published."""
    file = path / "model.safetensors"
    save_file({n: t.bfloat16() if t.is_floating_point() else t for n, t in load_file(file).items()}, file)
    return path


def check_equal(base, adapter_dir, out):
    """All tensors of ``out`` are PEFT's, and some are not the base's."""
    before, merged = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert merged.keys() == before.keys()
    expected = merge_and_unload(base, adapter_dir)
    changed = {name for name in merged if not torch.equal(merged[name], before[name])}
    for name in changed | (merged.keys() & expected.keys()):
        assert torch.equal(merged[name], expected[name].to(merged[name].dtype)), name
    return changed


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "alpha_pattern": {"q_proj": 3}}])
def test_dense_is_pefts_merge(tmp_path, tied, file, options):
    base, source = make_tiny(tmp_path / "base", tied=tied, dtype=torch.bfloat16), tmp_path / "adapter"
    linears = {n: BaseCheckpoint(base).linear_shape(n) for n in BaseCheckpoint(base).linears - {"lm_head"}}
    config, tensors = adapter(linears, rank=4)
    tensors = {name: 0.1 * tensor for name, tensor in tensors.items()}
    directory.write_adapter(source, config | options, tensors)
    if file.endswith(".bin"):
        (source / "adapter_model.safetensors").unlink()
        torch.save(tensors, source / file)
    merged = merge_adapter(source, base, tmp_path / "out")
    assert check_equal(base, source, tmp_path / "out") == {f"{name}.weight" for name in linears}
    assert merged.modules == len(linears) and 0 < merged.rounding.lost_share < 0.1


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "deepseek_v3"])
@pytest.mark.parametrize("layout", ["fused", "split"])
def test_experts_are_pefts_merge(tmp_path, family, layout):
    """``layout``: gate and up share their A, or have each their own."""
    base = in_bfloat16(make_checkpoint(tmp_path / "base", family))
    values = values_of(base, 3, layout)
    write_adapter(tmp_path / "adapter", base, values, rank=3, alpha=5)
    merge_adapter(tmp_path / "adapter", base, tmp_path / "out")
    assert check_equal(base, tmp_path / "adapter", tmp_path / "out") == {f"{name}.weight" for name in values}


def test_stacked_experts_as_peft_saves_them(tmp_path):
    """``target_parameters``, written by PEFT itself after training: one A and one B for all experts of a layer."""
    from moe_reference import peft_model

    base = in_bfloat16(make_checkpoint(tmp_path / "base", "qwen2_moe"))
    values = values_of(base, 3, "split")
    peft_model(base, write_adapter(tmp_path / "seed", base, values, rank=3, alpha=5)).save_pretrained(tmp_path / "a")
    assert any("experts.lora_A" in name for name in load_file(tmp_path / "a" / "adapter_model.safetensors"))
    merge_adapter(tmp_path / "a", base, tmp_path / "out")
    assert check_equal(base, tmp_path / "a", tmp_path / "out") == {f"{name}.weight" for name in values}


@pytest.fixture
def pair(tmp_path):
    base = base_checkpoint(tmp_path / "base")
    checkpoint = BaseCheckpoint(base)
    directory.write_adapter(tmp_path / "adapter", *adapter(), base=checkpoint, base_digest=weights_digest(checkpoint))
    return base, tmp_path / "adapter", tmp_path / "out"


def merge(pair, capsys):
    base, source, out = pair
    code = cli.main(["merge", str(source), "--hf-checkpoint", str(base), "--out", str(out)])
    return code, *capsys.readouterr()


def test_verb_says_what_it_did(pair, capsys):
    code, out, err = merge(pair, capsys)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"{pair[1]}: 14 matrices merged"
    assert lines[1] == "base compared: every byte of 16 tensors"
    assert lines[2].startswith("lost to rounding: 0.00%") and lines[3] == str(pair[2])


def test_another_base_is_refused_by_one_byte_of_its_last_tensor(pair, capsys):
    """Beyond the 4 KiB of each tensor that a fingerprint samples."""
    file = pair[0] / "model.safetensors"
    tensors = load_file(file) | {"model.embed_tokens.weight": torch.zeros(3000, 8)}
    save_file(tensors, file)
    checkpoint = BaseCheckpoint(pair[0])
    directory.write_adapter(pair[1], *adapter(), base=checkpoint, base_digest=weights_digest(checkpoint))
    tensors["model.embed_tokens.weight"][-1, -1] = 1
    save_file(tensors, file)
    code, out, err = merge(pair, capsys)
    assert (code, out) == (1, "") and "made for a base with other weights" in err and err.count("\n") == 1
    assert not pair[2].exists()


def zero_B(config, tensors):
    return config, {name: 0 * tensor if "lora_B" in name else tensor for name, tensor in tensors.items()}


def infinite(config, tensors):
    name = next(iter(tensors))
    return config, {**tensors, name: tensors[name] / 0}


def trained_head(config, tensors):
    return config | {"modules_to_save": ["score"]}, {**tensors, "base_model.model.score.weight": torch.ones(2, 8)}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (zero_B, "every lora_B is zero"),
        (infinite, "not finite"),
        (trained_head, "modules_to_save holds whole modules (score)"),
        (lambda config, tensors: (config | {"use_dora": True}, tensors), "use_dora"),
        (lambda config, tensors: (config, dict(list(tensors.items())[1:])), "lora_A.weight is missing"),
    ],
)
def test_what_cannot_be_merged_is_refused_before_anything_is_written(pair, capsys, change, line):
    config, tensors = change(*adapter())
    (pair[1] / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, pair[1] / "adapter_model.safetensors")
    code, out, err = merge(pair, capsys)
    assert (code, out) == (1, "") and line in err and err.count("\n") == 1
    assert sorted(path.name for path in pair[2].parent.iterdir()) == ["adapter", "base"]


def test_places(pair, capsys):
    base, source, out = pair
    assert merge((base, source, base), capsys)[0] == merge((base, source, source), capsys)[0] == 2
    out.mkdir()
    (out / "mine").write_text("")
    code, _, err = merge(pair, capsys)
    assert code == 2 and "is not empty" in err


KILLED = """
import os, signal, sys
from pathlib import Path
from slime_plugins.lora.peft.merge import merge_adapter

adapter, base, out = map(Path, sys.argv[1:])
operations = ("open", "os.rename", "os.mkdir", "shutil.copyfile", "os.rmdir", "os.remove")
killed = 0
while True:
    child = os.fork()
    if child == 0:
        left = [killed]
        def hook(event, args):
            if event in operations and str(args[0]).startswith(str(out.parent / "")):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        merge_adapter(adapter, base, out)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert status == signal.SIGKILL, status
    killed += 1
    print(sorted(path.name for path in out.iterdir()) if out.exists() else None, len(list(out.parent.iterdir())))
    if out.exists():
        out.rename(out.parent.parent / f"whole-{killed}")
print("done", killed)
"""


def test_killed_before_any_operation_leaves_all_or_nothing(pair):
    """SIGKILL before the first, second, ... operation in the place of the result, until one merge gets through."""
    base, source, _ = pair
    out = base.parent / "place" / "out"
    out.parent.mkdir()
    command = [sys.executable, "-c", KILLED, source, base, out]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *states, last = done.stdout.splitlines()
    assert last == f"done {len(states)}" and len(states) >= 6
    assert sum(state.startswith("None 1") for state in states) >= 4, "the kills have all missed"
    expected = load_file(out / "model.safetensors")
    for state, number in ((state, i + 1) for i, state in enumerate(states) if not state.startswith("None")):
        whole = base.parent / f"whole-{number}"
        assert state.startswith("['config.json', 'model.safetensors']")
        assert all(torch.equal(t, expected[n]) for n, t in load_file(whole / "model.safetensors").items())
    assert [path.name for path in out.parent.iterdir()] == ["out"], "what dead writers left is removed"


PEAK = """
import re, sys
import torch
from pathlib import Path
from slime_plugins.lora.peft.merge import merge_adapter

def high_water():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
torch.ones(64, 64) @ torch.ones(64, 64)
before = high_water()
merge_adapter(*sys.argv[1:])
print(high_water() - before)
"""


def test_memory_is_that_of_a_matrix(tmp_path):
    """24 matrices of 8 MB: neither the base (201 MB) nor the adapter (25 MB) is held."""
    rows = columns = 2048
    linears = {f"model.layers.{i}.mlp.up_proj": (rows, columns) for i in range(24)}
    config, tensors = adapter(linears, rank=128, dtype=torch.bfloat16)
    base = base_checkpoint(tmp_path / "base", {})
    weights = {f"{name}.weight": torch.randn(rows, columns).bfloat16() for name in linears}
    save_file(load_file(base / "model.safetensors") | weights, base / "model.safetensors")
    directory.write_adapter(tmp_path / "adapter", config, tensors)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "adapter", base, tmp_path / "out"],
        capture_output=True, text=True, timeout=200,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed is given back, so that peaks show
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    matrix = 4 * rows * columns  # in float32
    peak = int(done.stdout)
    print(f"peak {peak / 1e6:.0f} MB, {peak / matrix:.1f} float32 matrices")
    assert peak < 2.5 * matrix + 32e6  # W, its update and W' in their dtypes; buffers of a fixed size
