"""The linears of routed experts alone: frozen as one grouped product, and with the adapters of all experts on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from _gpu_clock import Budget
from _gpu_forms import ALONE, te_layer
from _harness import Trainer, add_lora, build_model, freeze

if TYPE_CHECKING:
    from _gpu_sections import Run

ADAPTED = ("experts.linear_fc1", "experts.linear_fc2")
FORMS: dict[str, Callable[..., None]] = {
    "frozen": lambda model, *, rank: freeze(model),
    "lora": partial(add_lora, target_modules=ADAPTED),
}
ROUNDING = 2**-7
"""Allowed of the largest entry: bf16 has 8 bits, and h, its product and their sum are rounded one after the other."""


def measure(run: Run, budget: Budget) -> None:
    """First whether bf16 computes what float64 does, then the time of forward and backward."""
    _one_grouped_product()
    count, width, inner = run.sizes.experts
    trainers: dict[str, Trainer] = {}
    for name in FORMS:
        with budget.attempt(name):
            trainers[name] = _trainer(run, name)
    for leaf, (size_in, size_out) in {"linear_fc1": (width, 2 * inner), "linear_fc2": (inner, width)}.items():
        linears = {
            name: getattr(trainer.model.module.decoder.layers[0].mlp.experts, leaf)
            for name, trainer in trainers.items()
        }
        fits = False
        with budget.attempt(f"{leaf} in bf16 against float64"):
            errors = _errors(linears["lora"], spread(run.sizes.rows[-1], count, "skewed"), size_in, size_out)
            wrong = {what: f"{error:.1e}" for what, error in errors.items() if not error <= ROUNDING}
            if wrong:
                raise ValueError(
                    f"{leaf} in bf16 is not what float64 computes: {wrong}, at most {ROUNDING:.1e} allowed"
                )
            fits = True
        for rows in run.sizes.rows:
            for how in ("even", "skewed"):
                case = {"linear": leaf, "rows": rows, "spread": how}
                if fits and budget.allows(f"{leaf}, {rows} rows, {how}"):
                    with budget.attempt(str(case)):
                        _one_case(run, case, linears, spread(rows, count, how), size_in, size_out)


def spread(rows: int, count: int, how: str) -> list[int]:
    """Rows of each expert. skewed: halves, quarters, ... of what is left, and the last two get none."""
    if how == "even":
        return [rows // count + (i < rows % count) for i in range(count)]
    splits, left = [], rows
    for _ in range(count - 3):
        splits.append(left // 3)
        left -= splits[-1]
    return [*splits, left, 0, 0]


def _trainer(run: Run, name: str) -> Trainer:
    from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec

    count, width, inner = run.sizes.experts

    def layer(base, config):
        spec = te_layer(base, config)
        spec.submodules.mlp = get_mlp_module_spec(use_te=True, num_experts=count, moe_grouped_gemm=True)
        return spec

    shapes = dataclasses.replace(run.sizes.model, hidden=width, num_layers=1, vocab_size=128, tokens=16)
    model = build_model(
        shapes,
        ALONE,
        layer,
        num_moe_experts=count,
        moe_ffn_hidden_size=inner,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=True,
    )
    FORMS[name](model, rank=run.sizes.ranks[0])
    return Trainer(model, shapes.vocab_size, shapes.tokens)


def _one_case(
    run: Run, case: dict[str, Any], linears: dict[str, Any], splits: list[int], size_in: int, size_out: int
) -> None:
    from _gpu_sections import rows_of, there_and_back

    x, dy = (_draw(run, sum(splits), size) for size in (size_in, size_out))
    calls = {
        name: there_and_back(lambda x, linear=linear: linear(x, splits)[0], x, dy) for name, linear in linears.items()
    }
    times = run.clock.turns(calls, rounds=run.sizes.rounds, repeats=3, alone=True)
    wide = (x.numel() + dy.numel()) * x.element_size()
    least = 2 * wide + 2 * len(splits) * size_in * size_out * x.element_size()
    run.report.row("experts", **case, forms=rows_of(run, times, wide, least))


def _draw(run: Run, rows: int, size: int) -> torch.Tensor:
    return torch.randn(rows, size, device=torch.cuda.current_device(), dtype=getattr(torch, run.sizes.model.dtype))


def _errors(linear: Any, splits: Sequence[int], size_in: int, size_out: int) -> dict[str, float]:
    """y, dx, dA and dB against a loop over experts in float64, relative to the largest entry."""
    device, dtype = torch.cuda.current_device(), linear.lora_A.dtype
    x = torch.randn(sum(splits), size_in, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(sum(splits), size_out, device=device, dtype=dtype)
    for parameter in (linear.lora_A, linear.lora_B):
        parameter.main_grad.zero_()
    y = linear(x * 1.0, list(splits))[0]
    y.backward(dy)
    scale = linear.lora.config.scaling()
    exact = {"x": x, "A": linear.lora_A, "B": linear.lora_B}
    exact = {key: value.detach().double().requires_grad_() for key, value in exact.items()}
    weights = [getattr(linear, f"weight{i}").detach().double() for i in range(len(splits))]
    pairs = zip(exact["x"].split(splits), weights, exact["A"], exact["B"])
    by_hand = torch.cat([rows @ w.t() + scale * (rows @ a.t()) @ b.t() for rows, w, a, b in pairs])
    by_hand.backward(dy.double())
    seen = {"y": y, "dx": x.grad, "dA": linear.lora_A.main_grad, "dB": linear.lora_B.main_grad}
    wanted = {"y": by_hand.detach(), "dx": exact["x"].grad, "dA": exact["A"].grad, "dB": exact["B"].grad}
    return {key: ((seen[key].double() - wanted[key]).abs().max() / wanted[key].abs().max()).item() for key in seen}


class _Grouped(torch.autograd.Function):
    """The frozen product of a TransformerEngine linear of experts as one kernel each way."""

    @staticmethod
    def forward(ctx, inp, m_splits, module, *weights_and_biases):
        ends, weight = _ends(tuple(m_splits), inp.device), _stacked(module)
        ctx.save_for_backward(weight, ends)
        return torch.nn.functional.grouped_mm(inp, weight.transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx, grad):
        weight, ends = ctx.saved_tensors
        dx = torch.nn.functional.grouped_mm(grad.contiguous(), weight, offs=ends)
        return (dx, None, None, *[None] * (len(ctx.needs_input_grad) - 3))


@lru_cache
def _ends(splits: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Where each expert's rows end; made once, so that it costs the base nothing."""
    return torch.tensor(splits).cumsum(0).to(torch.int32).to(device)


def _stacked(module: Any) -> torch.Tensor:
    """The experts' weights as one [E, O, I], which they are views of from the first call on."""
    stacked = module.__dict__.get("stacked")
    if stacked is None:
        weights = module._get_weight_tensors()
        stacked = module.__dict__["stacked"] = torch.stack([weight.detach() for weight in weights])
        for weight, whole in zip(weights, stacked):
            weight.data = whole
    return stacked


def _one_grouped_product() -> None:
    """In place of the loop over experts that the stand-in of TransformerEngine has."""
    from transformer_engine.pytorch import module as stand_in

    stand_in._GroupedLinear = _Grouped
