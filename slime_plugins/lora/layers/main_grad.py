"""A gradient of an adapter, added to Megatron DDP's ``main_grad`` by the backward that makes it.

In the buffer's own precision, and without the two passes of a gradient that autograd hands on (Megatron's
``grad_added_to_main_grad``, which its own weight gradients are written with).
"""

from __future__ import annotations

from functools import lru_cache

import torch

from slime_plugins.lora.layers.lowrank import outer


def outer_into(parameter, a_NK: torch.Tensor, b_NM: torch.Tensor, scaling: float) -> torch.Tensor:
    """scaling * a^T b [K, M], for a parameter of that shape."""
    main_grad = main_grad_of(parameter)
    if main_grad is not None and main_grad.dtype == a_NK.dtype:
        # A product with few rows, not few columns, is twice as fast on a CPU.
        flip = a_NK.shape[1] > b_NM.shape[1]
        into, left, right = (main_grad.t(), b_NM, a_NK) if flip else (main_grad, a_NK, b_NM)
        into.addmm_(left.t(), right, alpha=scaling)
        return added(parameter)
    if main_grad is not None and _adds_products_of(a_NK.dtype, main_grad.dtype, a_NK.device):
        torch.addmm(main_grad, a_NK.t(), b_NM, alpha=scaling, out_dtype=main_grad.dtype, out=main_grad)
        return added(parameter)
    return outer(a_NK, b_NM, scaling).to(parameter.dtype)


def main_grad_of(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """Megatron DDP's buffer for the gradient, if a backward may add to it by itself."""
    if not hasattr(parameter, "grad_added_to_main_grad") or hasattr(parameter, "__fsdp_param__"):
        return None
    return getattr(parameter, "main_grad", None)


def added(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Tell DDP's hook, which wants a gradient to be called at all: one that nobody reads."""
    parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(parameter)


@lru_cache
def _adds_products_of(dtype: torch.dtype, into: torch.dtype, device: torch.device) -> bool:
    """Does torch add products of a narrow dtype to a wide matrix in place here, and rightly?

    Asked of the device itself, by an example: the operator has no documented word on ``out`` being its own argument.
    """
    if device.type != "cuda":
        return False
    a, b = (torch.arange(64 * n, device=device).remainder(7).to(dtype).view(64, n) for n in (16, 32))
    expected = a.to(into).t() @ b.to(into) * 2 + 1
    got = torch.ones(16, 32, dtype=into, device=device)
    try:
        torch.addmm(got, a.t(), b, alpha=2, out_dtype=into, out=got)
    except (RuntimeError, TypeError):
        return False
    return bool((got - expected).abs().max() <= 1e-3 * expected.abs().max())
