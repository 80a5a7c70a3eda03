"""Rehearsals of bases with routed experts and with linear attention, from the command line.

pytest tests/rehearsal/test_rehearse_more_bases.py            # Qwen3-MoE at EP 2, and what is refused
pytest tests/rehearsal/test_rehearse_more_bases.py -m slow    # other layouts, resuming, Qwen3.5 and Qwen3-Next
"""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from rehearsals import Rehearsal
from safetensors.torch import load_file

from slime_plugins.lora.base.decoder import HFBase
from slime_plugins.lora.cli import main
from slime_plugins.lora.rehearsal import tiny

SHORT = ("--objective", "sft", "--steps", "2", "--rollout-batch-size", "8", "--lr", "5e-3")
EP2 = ("--tp", "1", "--dp", "2", "--ep", "2")


@pytest.fixture(scope="module")
def flags_of(tmp_path_factory):
    """Flags of a run on the tiny checkpoint of a family."""
    root = tmp_path_factory.mktemp("bases")
    prompts = root / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"input": f"t{i} t9", "label": f"t{i + 1}"}) + "\n" for i in range(10, 40)))
    made: dict[str, list[str]] = {}

    def flags(family: str) -> list[str]:
        if family not in made:
            base = tiny.make_tiny(root / family, family, num_layers=4 if family in tiny.WITH_LINEAR else 2)
            made[family] = ["--hf-checkpoint", str(base), "--prompt-data", str(prompts)]
        return made[family]

    return flags


def rehearsed(tmp_path, name, *flags, timeout=240) -> dict:
    """Runs to its end; the summary."""
    with Rehearsal(tmp_path / name, tmp_path / "cache", *map(str, flags)) as run:
        code, log = run.wait(timeout)
        assert code == 0, log
        assert not run.orphans()
    summary = json.loads((tmp_path / name / "summary.json").read_text())
    assert summary["base_checksum_before"] == summary["base_checksum_after"]
    assert 0 < summary["logits_max_abs_diff"] <= 1e-4
    return summary


def adapter(tmp_path, name):
    return load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")


def first_step(tmp_path, name) -> dict:
    return json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])


def served_logits(directory, hf_dir=None):
    """Of the directory that ``transformers serve`` is given, or of a base alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_dir or directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(4, 28).view(2, 12)).logits


def test_experts_over_two_ranks(tmp_path, flags_of):
    """Every expert has an adapter, trained; what is served is another model than the base."""
    flags = flags_of("qwen3_moe")
    summary = rehearsed(tmp_path, "run", *flags, *SHORT, *EP2)
    experts = sum(math.prod(shape) for name, shape in HFBase.read(flags[1]).shapes().items() if ".experts." in name)
    assert summary["parameters_of_a_rank"] < summary["total_parameters"] - experts // 2, "each rank has half of them"
    tensors = adapter(tmp_path, "run")
    for layer in range(2):
        for expert in range(8):
            for leaf in ("gate_proj", "up_proj", "down_proj"):
                name = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{leaf}"
                assert f"{name}.lora_A.weight" in tensors
                assert tensors[f"{name}.lora_B.weight"].any(), name
    assert (served_logits(tmp_path / "run" / "serve") - served_logits("", flags[1])).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_experts_resume_at_another_parallelism(tmp_path, flags_of):
    """Four steps at EP 2; two there and two at EP 1, TP 2 and EP 2, or over stages end in the same adapter."""
    flags = [*flags_of("qwen3_moe"), *SHORT[:2], *SHORT[4:]]
    saved = tmp_path / "saved"
    rehearsed(tmp_path, "whole", *flags, "--steps", 4, *EP2, "--save", saved, "--save-interval", 2)
    expected = adapter(tmp_path, "whole")
    half = saved / "iter_0000002"
    for name, layout in (
        ("ep2", EP2),
        ("ep1", ("--tp", "1")),
        ("tp2-ep2", ("--tp", "2", "--sp", "--ep", "2", "--etp", "1")),
        ("tp2-ep2-etp2", ("--tp", "2", "--sp", "--dp", "2", "--ep", "2")),
        ("pp2", ("--tp", "1", "--pp", "2")),
    ):
        rehearsed(tmp_path, name, *flags, "--steps", 4, *layout, "--load", half)
        for key, tensor in adapter(tmp_path, name).items():
            if name == "ep2":
                assert torch.equal(tensor, expected[key]), key
            # Adam over two steps, sums in another order.
            assert (tensor - expected[key]).abs().max() < 1e-3 * 5e-3, (name, key)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "family, first, second",
    [
        ("qwen3_5", ("--tp", "2", "--sp"), ("--tp", "1", "--pp", "2")),
        ("qwen3_5_moe", EP2, ("--tp", "1")),
        ("qwen3_next", ("--tp", "2", "--sp", "--ep", "2", "--etp", "1"), ("--tp", "1")),
    ],
)
def test_linear_attention(tmp_path, flags_of, family, first, second):
    """Trained at two layouts to the same adapter, that of linear attention among it; resumed from one at the other."""
    flags, saved = [*flags_of(family), *SHORT], tmp_path / "saved"
    rehearsed(tmp_path, "first", *flags, *first, "--save", saved, timeout=600)
    rehearsed(tmp_path, "second", *flags, *second, timeout=600)
    tensors, others = adapter(tmp_path, "first"), adapter(tmp_path, "second")
    assert any(".linear_attn.out_proj.lora_B" in name for name in tensors)
    for name, tensor in tensors.items():
        assert tensor.any(), name
        # A hundredth of a step: Adam divides a gradient near zero by its own size, and rounding is all of it there.
        assert (tensor - others[name]).square().mean().sqrt() < 1e-2 * 5e-3, name
    # To which Adam is blind: how large the gradient is.
    norms = [first_step(tmp_path, name)["grad_norm"] for name in ("first", "second")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    rehearsed(tmp_path, "third", *flags, *second, "--load", saved, "--steps", "3", timeout=600)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family, layout", [("qwen3_moe", EP2), ("qwen3_5", ("--tp", "2"))])
def test_rl(tmp_path, flags_of, family, layout):
    """GRPO: the policy that samples is the one that trains."""
    flags = ["--rollout-max-response-len", "1", "--steps", "2", "--rollout-batch-size", "16", "--rm-type", "exact"]
    flags += ["--n-samples-per-prompt", "16", "--num-steps-per-rollout", "1"]
    rehearsed(tmp_path, "run", *flags_of(family), *flags, *layout, timeout=600)
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(step["rollout_log_prob_abs_diff"] < 1e-5 for step in steps)


def refused(flags, tmp_path, capsys) -> tuple[int, str]:
    code = main(["rehearse", "--out", str(tmp_path / "out"), *map(str, flags)])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    return code, error


@pytest.mark.parametrize(
    "family, flags, words",
    [
        ("qwen3_moe", ("--tp", 1, "--ep", 2), "--tp 1 x --dp 1 = 1 is no multiple of 2; raise --dp"),
        ("qwen3_moe", ("--tp", 2, "--sp", "--ep", 2), "= 2 is no multiple of 4; raise --dp or lower --etp"),
        ("qwen3_moe", ("--tp", 1, "--dp", 3, "--ep", 3), "--ep 3: 8 experts of .* are not divisible by 3"),
        (
            "qwen3_moe",
            ("--tp", 1, "--dp", 5, "--etp", 5),
            "--etp 5: 24 channels of an expert of .* not divisible by 5",
        ),
        ("qwen3_moe", ("--tp", 2), "--tp 2 without --sp: Megatron trains routed experts.* add --sp, or use --tp 1"),
        ("qwen3_moe", ("--tp", 1, "--ep", 0), "--ep 0: expected a whole number from 1"),
        ("qwen3_moe", ("--tp", 1, "--lora-base-quant", "nf4"), "would not store stacked experts alike"),
        ("qwen3_5", ("--tp", 1, "--lora-base-quant", "nf4"), "would not store linear attention alike"),
        ("qwen3", ("--tp", 1, "--dp", 2, "--ep", 2), "--ep 2: .* has no routed experts; drop it"),
        ("qwen3", ("--tp", 2, "--etp", 1), "--etp 1: .* has no routed experts; drop it"),
        (
            "qwen3_moe",
            ("--tp", 1, "--lora-r", 50, "--lora-target-modules", "experts.linear_fc1"),
            "LoRA rank 50 is larger than .*experts.linear_fc1, a 48 x 64 matrix; use at most 48",
        ),
    ],
)
def test_refusals(flags_of, tmp_path, capsys, family, flags, words):
    flags = [*flags_of(family), *SHORT, "--rollout-batch-size", 30, *flags]
    capsys.readouterr()
    code, error = refused(flags, tmp_path, capsys)
    assert code == 2
    assert re.search(words, error), error


def edited(source, target, **changes):
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).symlink_to(file)
    (target / "config.json").unlink()
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


@pytest.mark.parametrize(
    "family, changes, words",
    [
        ("qwen3_5", {"architectures": ["Qwen3_5ForConditionalGeneration"]}, "sees images, and text bases alone"),
        ("qwen3_5", {"layer_types": ["linear_attention"]}, "layer_types is .* for each of 4 layers"),
        ("qwen3_5", {"linear_num_value_heads": 8}, r"missing: none; unexpected: none|has shape .*, config.json says"),
        ("qwen3_moe", {"num_experts": 9}, r"missing: model.layers.0.mlp.experts.8.down_proj.weight"),
        ("qwen3_moe", {"num_experts": 4}, r"unexpected: model.layers.0.mlp.experts.4.down_proj.weight"),
        ("qwen3_moe", {"moe_intermediate_size": 32}, r"experts.0.* has shape .*24.*, config.json says .*32"),
        ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers is 1, expected a list"),
    ],
)
def test_bad_checkpoints(flags_of, tmp_path, capsys, family, changes, words):
    flags = flags_of(family)
    base = edited(HFBase.read(flags[1]).path, tmp_path / "bad", **changes)
    capsys.readouterr()
    code, error = refused(["--hf-checkpoint", base, *flags[2:], *SHORT], tmp_path, capsys)
    assert code == 1
    assert re.search(words, error), error


def test_a_family_that_transformers_lacks(flags_of, tmp_path, capsys, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if "qwen3_5" in name else found(name, *a))
    flags = flags_of("qwen3_5")
    capsys.readouterr()
    code, error = refused([*flags, *SHORT, "--tp", 1], tmp_path, capsys)
    assert code == 2
    assert "Qwen3_5ForCausalLM is not known to transformers" in error
