"""Weights, gradient buffers and optimizer state of models with experts, as reckoned and as Megatron allocates them.

pytest tests/cost/test_experts_memory.py
"""

from __future__ import annotations

import adapted
import moe_models
import moe_runs
import pytest
import torch
from harness import Layout
from tiny_checkpoints import tiny

from slime_plugins.lora import LoRAConfig, apply_lora
from slime_plugins.lora.adapters import iter_adapters
from slime_plugins.lora.base.moe import MoEBase
from slime_plugins.lora.cost.memory import Trained, adapters_of, stage_costs
from slime_plugins.lora.cost.model import Model, Split
from slime_plugins.lora.rehearsal.model import build_chunks

CONFIG = LoRAConfig(rank=4)
SPLITS = {
    "ep2-dp4": dict(ep=2, etp=1),
    "pp2-ep2": dict(pp=2, ep=2, etp=1),
    "ep2-etp2": dict(ep=2, etp=2),
    "tp2-ep2-etp1": dict(tp=2, sp=True, ep=2, etp=1),
}


def allocated(chunks) -> dict[str, int]:
    """Bytes of one rank after an optimizer step."""
    mine = [p for linear in iter_adapters(chunks) for p in (linear.lora_A, linear.lora_B)]
    own = {id(p) for p in mine}
    model = adapted.wrap(chunks)
    optimizer = adapted.optimizer_for(model, bf16=mine[0].dtype == torch.bfloat16 if mine else False)
    for chunk in model:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            buffer.grad_data.normal_()
    optimizer.step()
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    buffers = [b for chunk in model for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    trained = [p for p in parameters if p.requires_grad]
    return {
        "base_weights": sum(p.numel() * p.element_size() for p in parameters if id(p) not in own),
        "adapter_weights": sum(p.numel() * p.element_size() for p in mine),
        "trained": len(trained),
        "gradients": sum(4 * b.numel for b in buffers),
        "optimizer": _optimizer_bytes(optimizer, trained[0].dtype),
    }


def _optimizer_bytes(optimizer, dtype: torch.dtype) -> int:
    found = {}
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        tensors = [t for state in one.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        if dtype != torch.float32:  # float32 weights are their own masters
            tensors += [p for group in one.optimizer.param_groups for p in group["params"]]
        found |= {t.data_ptr(): t.numel() * t.element_size() for t in tensors if t.dim()}
    return sum(found.values())


def moe_rank(layout: Layout, hf_dir, config) -> dict[str, int]:
    return allocated(moe_runs.chunks_of(layout, hf_dir, False, config))


def dense_rank(layout: Layout, hf_dir, config) -> dict[str, int]:
    return allocated(build_chunks(hf_dir, dtype=torch.bfloat16, apply=lambda c: apply_lora(c, config)))


def compare(ranks, costs, split: Split, pp: int) -> None:
    """Weights exact; buffers within Megatron's padding; optimizer state of all ranks together within it."""
    per_stage = len(ranks) // pp
    for stage, cost in enumerate(costs):
        seen = ranks[stage * per_stage : (stage + 1) * per_stage]
        for rank in seen:
            assert (rank["base_weights"], rank["adapter_weights"]) == (cost.base_weights, cost.adapter_weights)
            # A parameter starts at a multiple of 64 elements, and a buffer ends at one that its ranks divide.
            slack = 4 * (64 * rank["trained"] + 2 * 128 * split.dp)
            assert 0 <= rank["gradients"] - cost.gradients <= slack
        # A rank's shard of a buffer is as even as the padding lets it be.
        assert sum(rank["optimizer"] for rank in seen) == pytest.approx(cost.optimizer * per_stage, abs=16 * per_stage)


@pytest.mark.parametrize(
    "name, method",
    [
        ("pp2-ep2", "lora"),
        ("pp2-ep2", "full"),
        ("ep2-etp2", "lora"),
        pytest.param("ep2-dp4", "lora", marks=pytest.mark.slow),
        pytest.param("tp2-ep2-etp1", "lora", marks=pytest.mark.slow),
    ],
)
def test_experts(pool4, tmp_path, name, method):
    sizes = SPLITS[name]
    path = moe_models.make_checkpoint(tmp_path, "glm4_moe" if name == "pp2-ep2" else "qwen2_moe")
    split = Split(dp=4 // sizes.get("tp", 1) // sizes.get("pp", 1), **sizes)
    model = Model.read(path)
    trained = Trained(lora=CONFIG) if method == "lora" else Trained(base=True)
    ranks = pool4.run(moe_rank, path, trained.lora, **sizes)
    compare(ranks, stage_costs(model, trained, split, "float32"), split, split.pp)


def test_optimizer_state_in_bf16_at_dp_2(pool2, tmp_path_factory):
    """float32 masters and two moments: 12 bytes a parameter, over the data-parallel ranks."""
    path = tiny(tmp_path_factory)
    ranks = pool2.run(dense_rank, path, CONFIG)
    model, split = Model.read(path), Split(dp=2)
    compare(ranks, stage_costs(model, Trained(lora=CONFIG), split, "bfloat16"), split, 1)
    assert sum(r["optimizer"] for r in ranks) == 12 * sum(a.parameters for a in adapters_of(model, CONFIG, split))


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "glm4_moe", "deepseek_v3"])
def test_shapes_are_those_of_transformers(tmp_path, family):
    """Name by name, on the meta device; transformers 5 stacks experts too, gate and up in one."""
    import transformers

    path = moe_models.make_checkpoint(tmp_path, family)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(path))
    expected = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        name = name.replace("shared_expert.", "shared_experts.")
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            expected |= {f"{stem}{p}_proj.weight": (shape[0], shape[1] // 2, shape[2]) for p in ("gate", "up")}
        else:
            expected[f"{name}.weight" if name.endswith("experts.down_proj") else name] = shape
    assert Model.read(path).shapes == expected


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_experts_per_tok": 99}, "num_experts_per_tok is 99, expected a whole number from 1 to 8"),
        ({"moe_intermediate_size": None}, "key 'moe_intermediate_size' is missing"),
        ({"quantization_config": {"quant_method": "fp8"}}, "give the dense checkpoint"),
        ({"mlp_only_layers": 3}, "expected a list of layer numbers"),
    ],
)
def test_bad_config_is_said(tmp_path, change, words):
    config = dict(
        architectures=["Qwen3MoeForCausalLM"], hidden_size=64, num_attention_heads=4, num_hidden_layers=2,
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, intermediate_size=64, vocab_size=100,
    )  # fmt: skip
    assert MoEBase.from_config(config, tmp_path).num_experts == 8
    with pytest.raises(ValueError, match=words):
        MoEBase.from_config({**config, **change}, tmp_path)
