"""Linears with adapters in the precision that a GPU trains in, against float64: bf16 here, and on a GPU all of it.

pytest tests/layers/test_bf16.py
pytest -m gpu tests/layers/test_bf16.py
"""

from __future__ import annotations

import itertools

import pytest
import torch
from adapted import rows_of_B
from harness import Layout
from one_linear import adapt_alone, layer_config, single_process_groups

from slime_plugins.lora import LoRAConfig
from slime_plugins.lora.layers.fused import Norm

HIDDEN, HEADS, GROUPS, HEAD_DIM, FFN, TOKENS, RANK = 64, 4, 2, 24, 80, 40, 8
LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
# Allowed of the largest entry: bf16 has 8 bits and TF32, which a GPU may take for float32, has 11; h, its product and
# the sum with the base's are rounded one after the other.
ROUNDING = {torch.bfloat16: 2**-7, torch.float32: 2**-9}


def errors(layout: Layout, dtype: torch.dtype, device: str, size: float = 1.0) -> dict[str, dict[str, float]]:
    """Linear, path, layout, kind of gradient -> y, dx, dA, dB: the error of each, relative to its largest entry.

    Args:
        size: of the adapter's matrices; at 1 it gives more than the base does, which rounding errors see best.
    """
    cases = itertools.product(LINEARS, ("fused", "taps"), ("fused", "split"), (False, True))
    return {str(case): _errors(*case, dtype, device, size) for case in cases}


def _errors(
    path: str, linears: str, parts: str, main_grad: bool, dtype: torch.dtype, device: str, size: float
) -> dict[str, float]:
    linear = _linear(path, dtype).to(device).requires_grad_(False)
    config = LoRAConfig(rank=RANK, alpha=3 * RANK, layout=parts)
    adapt_alone(linear, f"decoder.layers.0.{path}", config, linears)
    assert (linear.lora_fused is not None) == (linears == "fused")
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    for parameter, of_one in ((linear.weight, 1.0), (linear.lora_A, size), (linear.lora_B, size)):
        parameter.data.copy_(of_one * draw(*parameter.shape) / parameter.shape[-1] ** 0.5)
    if main_grad:  # as Megatron's DDP has it
        for parameter in (linear.lora_A, linear.lora_B):
            parameter.main_grad = torch.zeros(parameter.shape, device=device)
            parameter.grad_added_to_main_grad = False
    x, dy = draw(TOKENS, 1, linear.weight.shape[1]).requires_grad_(), draw(TOKENS, 1, linear.weight.shape[0])
    y = linear(x * 1.0)[0]  # not a leaf, as in a model
    y.backward(dy)
    seen = {"y": y, "dx": x.grad, "dA": _gradient(linear.lora_A), "dB": _gradient(linear.lora_B)}

    x64, A, B = (t.detach().double().requires_grad_() for t in (x, linear.lora_A, linear.lora_B))
    y64, h = x64 @ linear.weight.double().t(), config.scaling() * x64 @ A.t()
    for i, part in enumerate(linear.lora.parts):
        own = h[..., i * RANK : (i + 1) * RANK] if linear.lora.split else h
        y64 = y64.index_add(-1, part.index().to(device), own @ B[rows_of_B(linear, i).to(device)].t())
    y64.backward(dy.double())
    wanted = {"y": y64, "dx": x64.grad, "dA": A.grad, "dB": B.grad}
    off = {f"{key} rms": _off(seen[key], wanted[key]).square().mean().sqrt().item() for key in ("y", "dx")}
    return {key: _relative(seen[key], wanted[key]) for key in seen} | off


def _linear(path: str, dtype: torch.dtype) -> torch.nn.Module:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    config = layer_config(
        HIDDEN,
        HEADS,
        num_query_groups=GROUPS,
        kv_channels=HEAD_DIM,
        ffn_hidden_size=FFN,
        gated_linear_unit=True,
        params_dtype=dtype,
    )
    sizes = {
        "linear_qkv": (HIDDEN, (HEADS + 2 * GROUPS) * HEAD_DIM),
        "linear_proj": (HEADS * HEAD_DIM, HIDDEN),
        "linear_fc1": (HIDDEN, 2 * FFN),
        "linear_fc2": (FFN, HIDDEN),
    }[path.rpartition(".")[2]]
    common = dict(config=config, init_method=config.init_method, bias=False, skip_bias_add=False)
    common |= dict(tp_group=parallel_state.get_tensor_model_parallel_group())
    if path.endswith(("qkv", "fc1")):
        return ColumnParallelLinear(*sizes, gather_output=False, **common)
    return RowParallelLinear(*sizes, input_is_parallel=True, **common)


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Wherever it went."""
    return parameter.main_grad if getattr(parameter, "grad_added_to_main_grad", False) else parameter.grad


def _off(seen: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return (seen.detach().double() - wanted.detach()) / wanted.detach().abs().max()


def _relative(seen: torch.Tensor, wanted: torch.Tensor) -> float:
    return _off(seen, wanted).abs().max().item()


def check(found: dict[str, dict[str, float]], allowed: float) -> None:
    assert len(found) == 4 * 2 * 2 * 2
    wrong = {case: errors for case, errors in found.items() if not max(errors.values()) <= allowed}
    assert not wrong, wrong


def test_bf16(pool1):
    """So that what is allowed on a GPU has been seen to suffice."""
    [found] = pool1.run(errors, torch.bfloat16, "cpu")
    check(found, ROUNDING[torch.bfloat16])


def test_of_a_small_update_the_sum_is_rounded_once(pool1):
    """Fused, what is rounded twice is the adapter's term, a twentieth of the base's here; by taps it is the base's."""
    [found] = pool1.run(errors, torch.bfloat16, "cpu", 0.1)
    for case in itertools.product(LINEARS, ("fused", "split"), (False, True)):
        fused, taps = (found[str((case[0], linears, *case[1:]))] for linears in ("fused", "taps"))
        assert all(fused[key] <= 0.8 * taps[key] for key in ("y rms", "dx rms")), (case, fused, taps)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_a_gpu(dtype):
    """Kernels of the GPU's own: sums into a float32 ``main_grad`` of products in bf16, for one."""
    with single_process_groups("nccl"):
        check(errors(Layout(), dtype, "cuda"), ROUNDING[dtype])


def norm_errors(dtype: torch.dtype, device: str) -> dict[str, float]:
    """The fused path's RMSNorm: output, rho and the gradient of the input."""
    generator = torch.Generator().manual_seed(0)
    x, dy, gamma = (torch.randn(s, generator=generator).to(device, dtype) for s in ((TOKENS, 96), (TOKENS, 96), (96,)))
    norm = Norm(gamma, 1e-6)
    y, rho = norm(x)
    x64 = x.double().requires_grad_()
    rho64 = torch.rsqrt(x64.pow(2).mean(-1, keepdim=True) + norm.eps)
    y64 = x64 * rho64 * gamma.double()
    y64.backward(dy.double())
    assert rho.dtype == torch.float32
    seen = {"y": (y, y64), "rho": (rho.reshape(-1, 1), rho64), "dx": (norm.backward(dy, x, rho), x64.grad)}
    return {key: _relative(*pair) for key, pair in seen.items()}


def test_norm_in_bf16():
    assert max(norm_errors(torch.bfloat16, "cpu").values()) <= ROUNDING[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_norm_on_a_gpu(dtype):
    assert max(norm_errors(dtype, "cuda").values()) <= ROUNDING[dtype]
