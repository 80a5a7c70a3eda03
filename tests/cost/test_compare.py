"""``slime-lora plan --compare``: published sizes, what fits, refusals.

pytest tests/cost/test_compare.py
"""

from __future__ import annotations

import json

import pytest
from published_configs import write_config
from tiny_checkpoints import tiny

from slime_plugins.lora.cli import main

GIB = 2**30


def compared(capsys, *flags) -> list[dict]:
    assert main(["plan", "--compare", "--json", *map(str, flags)]) == 0
    return json.loads(capsys.readouterr().out)["models"]


def static(method: dict) -> float:
    """GiB without activations."""
    peak = method["peaks"]["full"]
    return sum(peak[part] for part in ("base_weights", "adapter_weights", "gradients", "optimizer")) / GIB


@pytest.mark.parametrize(
    "name, flags, expected",
    [
        ("Qwen3-4B", ["--tp", 2, "--dp", 4], [16.86, 3.82, 3.89, 4.04, 1.31, 3.77]),
        ("Qwen3-30B-A3B", ["--tp", 4, "--dp", 2, "--ep", 8, "--etp", 1], [65.16, 8.17, 8.86, 10.23, 2.86, 7.53]),
    ],
)
def test_published_sizes(tmp_path, capsys, name, flags, expected):
    """Reckoned once by hand, on eight GPUs; dense and with experts."""
    [model] = compared(capsys, "--hf-checkpoint", write_config(tmp_path, name), *flags)
    assert [static(method) for method in model["methods"]] == pytest.approx(expected, abs=0.011)


def test_what_recompute_fits(tmp_path, capsys):
    path = write_config(tmp_path, "Qwen3-4B")
    [model] = compared(capsys, "--hf-checkpoint", path, "--tokens", 8192, "--dp", 8)
    for method in model["methods"]:
        peaks = [method["peaks"][kind]["total"] for kind in ("full", "selective", "none")]
        assert peaks == sorted(peaks)
    full, lora = model["methods"][:2]
    assert lora["recompute"] == "none"
    [small] = compared(capsys, "--hf-checkpoint", path, "--dp", 8, "--gpu-memory", 40)
    full, lora = small["methods"][:2]
    assert (full["recompute"], lora["recompute"]) == (None, "full")


def test_for_people(tmp_path, tmp_path_factory, capsys):
    """Several models, dense and with experts, one that NF4's blocks do not divide; a picture."""
    paths = [str(write_config(tmp_path, name)) for name in ("Qwen2.5-0.5B", "Qwen3-30B-A3B")]
    png = tmp_path / "bars.png"
    flags = ["--tp", "2", "--dp", "2", "--ep", "2", "--png", str(png)]
    assert main(["plan", "--compare", "--hf-checkpoint", *paths, *flags]) == 0
    out = capsys.readouterr().out
    assert "recompute that it needs" in out and "Qwen3-30B-A3B: Qwen3MoeForCausalLM, 48 layers, 30.53B\n" in out
    assert "Qwen2.5-0.5B: Qwen2ForCausalLM, 24 layers, 0.49B; no experts, --ep and --etp do not concern it" in out
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert main(["plan", "--compare", "--hf-checkpoint", paths[0], str(tiny(tmp_path_factory))]) == 0
    out = capsys.readouterr().out
    assert "QLoRA r=8: decoder.layers.0.self_attention.linear_proj: 96 inputs do not divide" in out
    assert main(["plan", "--compare", "--hf-checkpoint", paths[0], "--lora-r", "64"]) == 0
    assert "LoRA r=64" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--gpu-memory", "40"], "--gpu-memory given without --compare"),
        (["--compare", "--tokens", "0"], "--tokens is 0; expected at least 1"),
        (["--compare", "--tokens", "7", "--tp", "2"], "--tokens 7 is no multiple of --tp 2"),
        (["--compare", "--new-tokens", "0"], "--new-tokens is 0"),
        (["--ep", "2", "--dp", "2"], "--ep 2: "),
        (["--etp", "2", "--dp", "2"], "has no routed experts; drop it"),
        (["--ep", "2"], "raise --dp"),
        (["--compare", "--no-lora-only-trainable"], "drop one"),
        (["--compare", "--gpu-memory", "-1"], "is no number above 0"),
    ],
)
def test_wrong_use_is_one_line(tmp_path, capsys, flags, words):
    path = str(write_config(tmp_path, "Qwen2.5-0.5B"))
    assert main(["plan", "--hf-checkpoint", path, *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1


def test_several_models_need_compare(tmp_path, capsys):
    path = str(write_config(tmp_path, "Qwen2.5-0.5B"))
    assert main(["plan", "--hf-checkpoint", path, path]) == 2
    assert "names 2 models, which needs --compare" in capsys.readouterr().err
