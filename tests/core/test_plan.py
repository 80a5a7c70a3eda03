"""``slime-lora plan`` against what is really allocated: apply_lora, Megatron's DDP buffers, the exported files.

pytest tests/core/test_plan.py
"""

from __future__ import annotations

import json
from functools import partial

import adapted
import moe_models
import nf4_oracle
import nf4_runs
import pytest
import torch
from harness import Layout
from safetensors.torch import load_file
from tiny_checkpoints import tiny

from slime_plugins.lora import BaseQuant, LoRAConfig, apply_lora, export_peft
from slime_plugins.lora.adapters import iter_adapters
from slime_plugins.lora.base.decoder import HFBase
from slime_plugins.lora.cli import main
from slime_plugins.lora.cost.memory import cost_of
from slime_plugins.lora.cost.model import Model, Split
from slime_plugins.lora.quant.packed import PackedWeight
from slime_plugins.lora.rehearsal.model import build_chunks

CONFIGS = [
    LoRAConfig(rank=3),
    LoRAConfig(rank=4, layout="split", dtype="bfloat16"),
    LoRAConfig(rank=2, target_modules=("q_proj", "v_proj", "linear_fc2"), layout="split"),
    LoRAConfig(rank=5, exclude_modules=("*.layers.0.*",), rank_pattern={"linear_fc1": 7}),
]


def measured(layout: Layout, hf_dir, config: LoRAConfig, out_dir) -> dict:
    """One rank: what was built, in elements and bytes."""
    reports = []
    chunks = build_chunks(hf_dir, apply=lambda c: reports.append(apply_lora(c, config)))
    adapter = [p for linear in iter_adapters(chunks) for p in (linear.lora_A, linear.lora_B)]
    names = {id(p) for p in adapter}
    result = {
        "trainable": reports[0].trainable_parameters,
        "total": reports[0].total_parameters,
        "base_weights": sum(
            p.numel() * p.element_size() for c in chunks for p in c.parameters() if id(p) not in names
        ),
        "tensors": len(adapter),
        "adapter_weights": sum(p.numel() * p.element_size() for p in adapter),
        "gradients": sum(4 * b.numel_unpadded for ddp in adapted.wrap(chunks) for b in ddp.buffers),
    }
    with torch.no_grad():
        for parameter in adapter:
            parameter.normal_()
    export_peft(chunks, out_dir, hf_checkpoint=hf_dir)
    return result


@pytest.mark.parametrize(
    ("sizes", "family", "config"),
    [({"tp": 2}, "qwen3", config) for config in CONFIGS]
    + [({"tp": 2}, "qwen2", CONFIGS[0]), ({"tp": 2}, "llama", CONFIGS[0])]
    + [({"pp": 2}, "qwen3", CONFIGS[3]), ({"pp": 2}, "llama", CONFIGS[1])],
)
def test_plan_says_what_is_built(pool2, tmp_path_factory, tmp_path, sizes, family, config):
    path = tiny(tmp_path_factory, family)
    ranks = pool2.run(measured, path, config, tmp_path / "adapter", **sizes)
    cost = cost_of(Model.of(HFBase.read(path)), config, Split(**sizes), dtype="float32")
    assert cost.adapter_parameters == ranks[0]["trainable"]
    assert cost.base_parameters == ranks[0]["total"] - ranks[0]["trainable"]
    fullest = max(ranks, key=lambda rank: rank["base_weights"] + rank["adapter_weights"])
    assert cost.lora.base_weights == fullest["base_weights"]
    assert cost.lora.adapter_weights == fullest["adapter_weights"]
    # Megatron starts every parameter at a multiple of 64 elements in its gradient buffer.
    assert 0 <= fullest["gradients"] - cost.lora.gradients < 64 * 4 * fullest["tensors"]
    exported = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert cost.sync_adapter == sum(tensor.numel() * tensor.element_size() for tensor in exported.values())


def measured_with_experts(layout: Layout, hf_dir, config: LoRAConfig, quant) -> dict:
    with moe_models.sizes(**nf4_oracle.MOE_SIZES):
        build = partial(moe_models.build_chunks, te=False, moe_grouped_gemm=False)
        chunks, reports = nf4_runs.chunks_of(layout, hf_dir, quant=quant, config=config, build=build)
    adapters = {id(p) for linear in iter_adapters(chunks) for p in (linear.lora_A, linear.lora_B)}
    stored = [p.packed.nbytes if isinstance(p, PackedWeight) else p.nbytes for p in base_only(chunks, adapters)]
    return {
        "trainable": reports[-1].trainable_parameters,
        "total": reports[-1].total_parameters,
        "base_weights": sum(stored),
        "adapter_weights": sum(p.nbytes for c in chunks for p in c.parameters() if id(p) in adapters),
        "gradients": sum(
            4 * b.numel_unpadded for ddp in adapted.wrap(chunks) for b in ddp.buffers + ddp.expert_parallel_buffers
        ),
        "tensors": len(adapters),
    }


def base_only(chunks, adapters):
    return (p for chunk in chunks for p in chunk.parameters() if id(p) not in adapters)


@pytest.mark.parametrize("quant", [None, BaseQuant()], ids=["dense", "nf4"])
@pytest.mark.parametrize(
    "sizes", [dict(ep=2, etp=1), dict(tp=2, sp=True, etp=2), dict(tp=2, sp=True, ep=2, etp=1)], ids=str
)
def test_plan_with_experts_says_what_is_built(pool2, tmp_path_factory, sizes, quant):
    with moe_models.sizes(**nf4_oracle.MOE_SIZES):
        path = moe_models.make_checkpoint(tmp_path_factory.mktemp("moe"), "qwen3_moe")
    config = LoRAConfig(rank=4, layout="split")
    ranks = pool2.run(measured_with_experts, path, config, quant, **sizes)
    split = Split(dp=1 if "tp" in sizes else 2, **sizes)
    cost = cost_of(Model.read(path), config, split, dtype="float32", base_quant=quant)
    assert cost.adapter_parameters == ranks[0]["trainable"]
    assert cost.base_parameters == ranks[0]["total"] - ranks[0]["trainable"]
    assert cost.lora.base_weights == ranks[0]["base_weights"]
    assert cost.lora.adapter_weights == ranks[0]["adapter_weights"]
    assert 0 <= ranks[0]["gradients"] - cost.lora.gradients < 64 * 4 * ranks[0]["tensors"]


def test_experts_on_the_command_line(tmp_path, capsys):
    config = dict(architectures=["Qwen3MoeForCausalLM"], hidden_size=256, intermediate_size=640, num_experts=8)
    config |= dict(moe_intermediate_size=128, num_experts_per_tok=2, num_hidden_layers=2, vocab_size=128)
    config |= dict(head_dim=64, num_attention_heads=4, num_key_value_heads=2)
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = ["plan", "--hf-checkpoint", str(tmp_path), "--load-in-4bit", "--tokens", "128"]
    assert main([*plan, "--tp", "2", "--ep", "2", "--etp", "1"]) == 0
    said = capsys.readouterr().out
    assert "tp 2, pp 1, dp 1, ep 2, etp 1" in said and "activations of 128 tokens, full recompute" in said
    assert main([*plan, "--dp", "2", "--ep", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["beside"]
    # the inputs of 2 layers and of the last norm, its scale, the rotary angles
    assert found["lora"]["kept"] == 128 * (3 * 256 * 2 + 4 + 64 * 4)
    assert found["full"]["kept"] == found["lora"]["kept"] + 128 * 256 * 2  # and the head's input
    # of the 4-bit base, 4 experts' gate and up: one linear of a rank, dense while it multiplies
    assert found["lora"]["work"] - found["full"]["work"] >= 4 * 2 * 128 * 256 * 2 - 128 * 4 * 256 * 2
    for flags, words in (
        (["--ep", "3", "--dp", "3"], "8 experts"),
        (["--ep", "4"], "--ep 4 x --etp 1 ranks share the experts of a stage"),
        (["--tp", "2", "--etp", "4", "--dp", "2", "--tokens", "0"], "--tokens is 0"),
    ):
        assert main([*plan, *flags]) == 2
        assert words in capsys.readouterr().err


def test_command_line(tmp_path_factory, capsys):
    path = str(tiny(tmp_path_factory))
    assert main(["plan", "--hf-checkpoint", path, "--tp", "2", "--lora-r", "4", "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    parts = ("base_weights", "adapter_weights", "gradients", "optimizer")
    assert numbers["lora"]["total"] == sum(numbers["lora"][part] for part in parts)
    # bf16 weight, float32 gradient, master and two moments
    assert numbers["full"]["gradients"] == 2 * numbers["full"]["base_weights"]
    assert numbers["full"]["optimizer"] == 6 * numbers["full"]["base_weights"]
    assert main(["plan", "--hf-checkpoint", path, "--lora-r", "4", "--no-lora-only-trainable"]) == 0
    assert "full training" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--tp", "3"], 2, "not divisible by 3"),
        (["--dp", "0"], 2, "expected at least 1"),
        (["--lora-r", "0"], 2, "at least 1"),
        (["--lora-target-modules", "nope"], 2, "match no module: nope"),
    ],
)
def test_bad_input_is_one_line(tmp_path_factory, capsys, flags, code, words):
    assert main(["plan", "--hf-checkpoint", str(tiny(tmp_path_factory)), *flags]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        (None, 2, "no config.json"),
        ("{", 1, "not JSON"),
        ('{"architectures": ["BertModel"]}', 1, "BertModel is not supported, only LlamaForCausalLM"),
        ('{"architectures": ["Qwen3ForCausalLM"]}', 1, "is missing"),
    ],
)
def test_bad_checkpoint_is_one_line(tmp_path, capsys, text, code, words):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert main(["plan", "--hf-checkpoint", str(tmp_path)]) == code
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
