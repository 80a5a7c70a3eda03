"""Logits and adapter gradients of adapted Megatron models against one-process transformers + PEFT, fp32.

pytest tests/layers/test_parity.py
"""

from __future__ import annotations

import adapted
import pytest
import reference
import torch
from harness import Layout
from tiny_checkpoints import tiny

from slime_plugins.lora import LoRAConfig
from slime_plugins.lora.adapters import iter_adapters
from slime_plugins.lora.names import hf_names

RANK, ALPHA = 4, 12.0


def parity(
    layout: Layout, hf_dir, config: LoRAConfig, ref_logits, ref_grads, tokens, microbatches, recompute, linears
):
    """Errors of this rank: logits (last stage) and the worst A and B gradient shard, relative to the largest entry."""
    torch.manual_seed(0)
    chunks = adapted.adapted_chunks(hf_dir, config, sp=layout.sp, vpp=layout.vpp, recompute=recompute, linears=linears)
    adapted.set_adapters(chunks, config.layout, RANK)
    logits = adapted.run_schedule(chunks, tokens, microbatches=microbatches, forward_only=True, collect_logits=True)
    logits = adapted.gather_logits(logits, ref_logits.shape[-1])
    model = adapted.wrap(chunks, distributed_optimizer=False)  # which would leave each DP rank a part of the sums
    adapted.train_step(model, None, tokens, microbatches=microbatches)
    errors = adapted.gradient_errors(model, ref_grads)
    if logits is not None:
        dp_rank = adapted.mpu.get_data_parallel_rank()
        expected = ref_logits.chunk(adapted.mpu.get_data_parallel_world_size())[dp_rank]
        errors["logits"] = adapted.relative(logits - expected, expected)
    return errors


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """family, layout -> (directory, tokens, logits, gradients), computed once."""
    cache = {}

    def get(family, layout, targets=reference.LEAVES):
        key = family, layout, tuple(targets)
        if key not in cache:
            path = tiny(tmp_path_factory, family)
            model = reference.peft_model(path, rank=RANK, alpha=ALPHA, layout=layout, targets=targets)
            tokens = reference.batch(model.config.vocab_size)
            logits, _, grads = reference.logits_loss_grads(model, tokens)
            cache[key] = path, tokens, logits, grads
        return cache[key]

    return get


def check(pool, references, family="qwen3", layout="fused", microbatches=1, recompute=None, linears="fused", **sizes):
    path, tokens, logits, grads = references(family, layout)
    config = LoRAConfig(rank=RANK, alpha=ALPHA, layout=layout)
    results = pool.run(parity, path, config, logits, grads, tokens, microbatches, recompute, linears, **sizes)
    assert sum(r["adapters"] for r in results) == 4 * 4 * pool.world_size // sizes.get("pp", 1)
    assert any("logits" in r for r in results)
    for r in results:
        assert r.get("logits", 0) <= 1e-5
        assert r["A"] <= 1e-4 and r["B"] <= 1e-4


def base_too(layout: Layout, hf_dir, config, tokens, ref_grads, ref_norm):
    """Errors of this rank's linear_proj and norm gradients, and of the grad norm over everything that trains."""
    chunks = adapted.adapted_chunks(hf_dir, config, sp=layout.sp, freeze_base=False)
    adapted.set_adapters(chunks, config.layout, RANK)
    model = adapted.wrap(chunks, distributed_optimizer=False)
    optimizer = adapted.optimizer_for(model, name="sgd", lr=0.0, distributed_optimizer=False)
    _, norm = adapted.train_step(model, optimizer, tokens)
    errors = [abs(norm / ref_norm - 1)]
    for name, parameter in model[0].module.named_parameters():
        leaf = name.rsplit(".", 2)[-2]
        if leaf in ("linear_proj", "pre_mlp_layernorm") and not name.endswith(("lora_A", "lora_B")):
            grad = ref_grads[name.split(".")[2], leaf]
            grad = (
                grad.chunk(layout.tp, dim=1)[adapted.mpu.get_tensor_model_parallel_rank()] if grad.dim() > 1 else grad
            )
            errors.append(adapted.relative(parameter.main_grad - grad, grad))
    return errors


@pytest.mark.parametrize("sizes", [dict(tp=2), dict(tp=2, sp=True)], ids=str)
def test_training_the_base_too(pool2, tmp_path_factory, sizes):
    """``--no-lora-only-trainable``: the base's own gradients pass through the taps unharmed."""
    path = tiny(tmp_path_factory, "llama")
    model = reference.peft_model(path, rank=RANK, alpha=ALPHA, layout="split").requires_grad_(True)
    tokens = reference.batch(model.config.vocab_size)
    reference.logits_loss_grads(model, tokens)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    grads = {}
    for i, layer in enumerate(model.base_model.model.model.layers):
        grads[str(i), "linear_proj"] = layer.self_attn.o_proj.base_layer.weight.grad
        grads[str(i), "pre_mlp_layernorm"] = layer.post_attention_layernorm.weight.grad
    config = LoRAConfig(rank=RANK, alpha=ALPHA, layout="split")
    for errors in pool2.run(base_too, path, config, tokens, grads, norm, **sizes):
        assert len(errors) == 1 + 2 * 4 and max(errors) <= 1e-4


LAYOUTS = ("fused", "split")
BOTH = pytest.mark.parametrize("linears", ["fused", "taps"])


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_process(pool1, references, layout, linears):
    check(pool1, references, layout=layout, linears=linears)


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sp", [False, True])
def test_tensor_parallel(pool2, references, layout, sp, linears):
    check(pool2, references, layout=layout, tp=2, sp=sp, linears=linears)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_other_families(pool2, references, family):
    check(pool2, references, family=family, tp=2, sp=True)


@BOTH
@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("sp", [False, True])
def test_recompute(pool2, references, recompute, sp, linears):
    """Hazard 5: the frozen embedding's output needs no gradient, so a checkpointed layer would give none."""
    check(pool2, references, recompute=recompute, tp=2, sp=sp, linears=linears)


def test_data_parallel(pool2, references):
    check(pool2, references)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pipeline(pool2, references, layout):
    check(pool2, references, layout=layout, pp=2, microbatches=2)


def test_interleaved_pipeline(pool2, references):
    """Hazard 15: with two chunks per stage the local layer numbers say nothing."""
    check(pool2, references, pp=2, vpp=2, microbatches=2)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recompute", [None, "full"])
@pytest.mark.parametrize(
    "sizes",
    [dict(tp=2, pp=2), dict(tp=2, pp=2, sp=True), dict(tp=2), dict(tp=2, sp=True), dict(pp=2, vpp=2), dict(pp=2)],
    ids=str,
)
def test_four_processes(pool4, references, family, layout, recompute, sizes, linears):
    how = dict(layout=layout, recompute=recompute, microbatches=2 if sizes.get("pp") else 1, linears=linears)
    check(pool4, references, family=family, **how, **sizes)


def targeted(layout: Layout, hf_dir, config, ref_logits, tokens, linears):
    chunks = adapted.adapted_chunks(hf_dir, config, sp=layout.sp, linears=linears)
    adapted.set_adapters(chunks, config.layout, RANK)
    logits = adapted.run_schedule(chunks, tokens, forward_only=True, collect_logits=True)
    names = [hf_names(linear.lora.name)[0] for linear in iter_adapters(chunks)]
    return adapted.relative(adapted.gather_logits(logits, ref_logits.shape[-1]) - ref_logits, ref_logits), names


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("targets", [("q_proj",), ("q_proj", "v_proj", "up_proj"), ("k_proj", "down_proj")], ids=str)
def test_single_projections(pool2, references, layout, targets, linears):
    """``q_proj`` alone adapts q rows alone, in either layout."""
    path, tokens, logits, _ = references("qwen3", layout, targets)
    config = LoRAConfig(rank=RANK, alpha=ALPHA, layout=layout, target_modules=targets)
    for error, names in pool2.run(targeted, path, config, logits, tokens, linears, tp=2, sp=True):
        assert error <= 1e-5
        assert len(names) == 4 * len({reference.FUSED.get(t, t) for t in targets})
