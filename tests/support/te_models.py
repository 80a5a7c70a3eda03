"""What the workers of the TransformerEngine tests run: the tiny model on TE's linears, and one linear alone."""

from __future__ import annotations

import itertools

import adapted
import torch
import torch.distributed as dist
from harness import Layout
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.dot_product_attention import DotProductAttention
from one_linear import adapt_alone, layer_config
from reference import draw

from slime_plugins.lora import LoRAConfig
from slime_plugins.lora.adapters import iter_adapters

HIDDEN, HEADS, GROUPS, HEAD_DIM = 24, 4, 2, 10


def te_layer_spec(base, config):
    """Megatron's TE layer with its own attention product, which needs no GPU."""
    layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=base.family.qk_norm)
    layer.submodules.self_attention.submodules.core_attention = DotProductAttention
    return layer


def parity_te(layout: Layout, hf_dir, config, ref_logits, ref_grads, tokens, recompute, linears):
    """Errors of this rank, relative to the largest entry: logits (last stage), worst A and B gradient shard."""
    how = dict(recompute=recompute, layer_spec=te_layer_spec, linears=linears)
    chunks = adapted.adapted_chunks(hf_dir, config, sp=layout.sp, **how)
    adapted.set_adapters(chunks, config.layout, config.rank)
    microbatches = layout.pp
    logits = adapted.run_schedule(chunks, tokens, microbatches=microbatches, forward_only=True, collect_logits=True)
    model = adapted.wrap(chunks, distributed_optimizer=False)
    adapted.train_step(model, None, tokens, microbatches=microbatches)
    errors = adapted.gradient_errors(model, ref_grads)
    errors["classes"] = sorted({type(linear).__name__ for linear in iter_adapters(model)})
    logits = adapted.gather_logits(logits, ref_logits.shape[-1])
    if logits is not None:
        expected = ref_logits.chunk(mpu.get_data_parallel_world_size())[mpu.get_data_parallel_rank()]
        errors["logits"] = adapted.relative(logits - expected, expected)
    return errors


def linear_alone(
    layout: Layout, kind: str, linears: str = "auto", device: torch.device | None = None
) -> dict[str, float]:
    """Case -> worst relative error of y, dx, dA, dB and the base's gradients against whole tensors.

    A base that trains is always run by taps.
    """
    return {
        f"return_bias={ret} frozen={frozen} fusion={fusion}": _errors(
            layout, kind, ret, frozen, fusion, device, linears
        )
        for ret, frozen, fusion in itertools.product((False, True), repeat=3)
    }


def _errors(layout, kind, return_bias, frozen, fusion, device, linears):
    device = device or torch.device("cpu")
    config = layer_config(
        HIDDEN,
        HEADS,
        on=device,
        num_query_groups=GROUPS,
        kv_channels=HEAD_DIM,
        add_bias_linear=True,
        normalization="RMSNorm",
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.sp,
        gradient_accumulation_fusion=fusion,
    )
    linear, name = _build(kind, config, return_bias)
    linear.to(device)
    rows = (HEADS + 2 * GROUPS) * HEAD_DIM
    fan_in, fan_out = (HEADS * HEAD_DIM, HIDDEN) if kind == "row" else (HIDDEN, rows)
    whole = {
        "weight": draw("W", fan_out, fan_in) / fan_in**0.5,
        "bias": draw("b", fan_out),
        "layer_norm_weight": draw("g", HIDDEN),
        "lora_A": draw("A", 3, fan_in) / fan_in**0.5,
        "lora_B": draw("B", fan_out, 3),
    }
    linear.requires_grad_(not frozen)
    parallel = adapt_alone(linear, name, _CONFIG, linears).parallel
    assert (linear.lora_fused is not None) == (frozen and linears == "auto"), linear.lora_why_taps
    axis = {"column": {"weight": 0, "bias": 0, "lora_B": 0}, "row": {"weight": 1, "lora_A": 1}}.get(parallel, {})
    tp, group = layout.tp, mpu.get_tensor_model_parallel_group()

    def mine(tensor, dim):
        return (tensor if dim is None else tensor.chunk(tp, dim)[group.rank()]).to(device)

    parameters = dict(linear.named_parameters())
    assert parameters.keys() == whole.keys() - (set() if kind == "norm_column" else {"layer_norm_weight"})
    for key, parameter in parameters.items():
        parameter.data.copy_(mine(whole[key], axis.get(key)))
        parameter.requires_grad_(not frozen or key.startswith("lora"))
        parameter.main_grad = torch.zeros_like(parameter)

    tokens = 4
    x, dy = draw("x", tokens, 2, fan_in), draw("dy", tokens, 2, fan_out)
    x_dim = 2 if kind == "row" else 0 if layout.sp else None
    y_dim = 2 if parallel == "column" else 0 if layout.sp else None
    x_local = mine(x, x_dim).contiguous().requires_grad_()
    y, bias = linear(x_local * 1.0)  # not a leaf, as in a model
    assert (bias is not None) == return_bias
    y.backward(mine(dy, y_dim))

    expected = {key: value.clone().requires_grad_() for key, value in whole.items()} | {"x": x.requires_grad_()}
    y_whole = _by_hand(expected, kind, return_bias)
    y_whole.backward(dy)
    errors = [adapted.relative(y.cpu() - mine(y_whole.detach(), y_dim).cpu(), y_whole.detach())]
    errors.append(adapted.relative(x_local.grad.cpu() - mine(x.grad, x_dim).cpu(), x.grad))
    for key, parameter in parameters.items():
        if not parameter.requires_grad or (return_bias and key == "bias"):
            continue
        grad = parameter.main_grad if key == "weight" and fusion else parameter.grad
        if layout.sp and getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(grad, group=group)  # as Megatron's finalize_model_grads does
        errors.append(adapted.relative(grad.cpu() - mine(expected[key].grad, axis.get(key)).cpu(), expected[key].grad))
    return max(errors)


_CONFIG = LoRAConfig(rank=3, alpha=6.0)


def _by_hand(p, kind, return_bias):
    x = p["x"]
    if kind == "norm_column":
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * p["layer_norm_weight"]
    y = x @ p["weight"].t() + _CONFIG.scaling() * (x @ p["lora_A"].t()) @ p["lora_B"].t()
    return y if return_bias else y + p["bias"]


def _build(kind, config, return_bias):
    from megatron.core.extensions import transformer_engine as te

    common = dict(config=config, init_method=config.init_method, bias=True, skip_bias_add=return_bias)
    rows = (HEADS + 2 * GROUPS) * HEAD_DIM
    qkv, proj = "decoder.layers.0.self_attention.linear_qkv", "decoder.layers.0.self_attention.linear_proj"
    tp_group = mpu.get_tensor_model_parallel_group()
    if kind == "duplicated":
        common |= dict(parallel_mode="duplicated", skip_weight_param_allocation=False)
        return te.TELinear(HIDDEN, rows, **common), proj
    common |= dict(is_expert=False, tp_group=tp_group)
    if kind == "row":
        return te.TERowParallelLinear(HEADS * HEAD_DIM, HIDDEN, input_is_parallel=True, **common), proj
    column = te.TELayerNormColumnParallelLinear if kind == "norm_column" else te.TEColumnParallelLinear
    return column(HIDDEN, rows, gather_output=False, **common), qkv


def grouped_alone(layout: Layout, leaf: str, rank: int, device: torch.device | None = None) -> dict[str, float]:
    """Gradients, output and input gradient of TE's linear of experts against a loop over experts; one has no token.

    ``leaf``: linear_fc1 (column) or linear_fc2 (row). ``rank``: 3 takes the padded product, 8 the grouped one.
    """
    from megatron.core.extensions import transformer_engine as te

    device, splits, scale = device or torch.device("cpu"), [3, 0, 8, 5], 2.0
    fan_in, fan_out = (HIDDEN, 32) if leaf == "linear_fc1" else (16, HIDDEN)
    config = layer_config(HIDDEN, HEADS, on=device, num_moe_experts=len(splits), gated_linear_unit=True)
    kind = te.TEColumnParallelGroupedLinear if leaf == "linear_fc1" else te.TERowParallelGroupedLinear
    linear = kind(
        len(splits),
        fan_in,
        fan_out,
        config=config,
        init_method=config.init_method,
        bias=False,
        skip_bias_add=False,
        is_expert=True,
    ).to(device)
    lora = LoRAConfig(rank=rank, alpha=scale * rank)
    base = adapt_alone(linear, f"decoder.layers.0.mlp.experts.{leaf}", lora)
    A, B = draw("A", len(splits), rank, fan_in) / fan_in**0.5, draw("B", len(splits), fan_out, rank)
    linear.requires_grad_(False)
    for parameter, value in ((linear.lora_A, A), (linear.lora_B, B)):
        parameter.data.copy_(value)
        parameter.requires_grad_()
    weights = [draw(f"W{i}", fan_out, fan_in) / fan_in**0.5 for i in range(len(splits))]
    for parameter, value in zip(base.parameters, weights):
        parameter.data.copy_(value)
    x, dy = draw("x", sum(splits), fan_in), draw("dy", sum(splits), fan_out)
    x_here = x.to(device).requires_grad_()
    y, bias = linear(x_here * 1.0, splits)
    assert bias is None
    y.backward(dy.to(device))

    x, A, B = (t.requires_grad_() for t in (x, A, B))
    rows = x.split(splits)
    by_hand = torch.cat([r @ (W + scale * B[i] @ A[i]).t() for i, (r, W) in enumerate(zip(rows, weights))])
    by_hand.backward(dy)
    pairs = {"y": (y, by_hand), "dx": (x_here.grad, x.grad)}
    pairs |= {"dA": (linear.lora_A.grad, A.grad), "dB": (linear.lora_B.grad, B.grad)}
    return {
        key: adapted.relative(seen.detach().cpu() - want.detach(), want.detach())
        for key, (seen, want) in pairs.items()
    }
