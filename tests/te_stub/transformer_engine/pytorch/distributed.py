"""The collectives of tensor and sequence parallelism, outside autograd, as TE's functions use them."""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
import torch.utils.checkpoint


class CudaRNGStatesTracker:
    """Base class of a Megatron tracker that is not used here."""


def activation_recompute_forward(*_args, **_kwargs):
    return contextlib.nullcontext()


def is_fp8_activation_recompute_enabled() -> bool:
    return False


def get_all_rng_states() -> dict:
    return {}


def checkpoint(
    function, *args, distribute_saved_activations=False, get_rng_state_tracker=None, tp_group=None, **kwargs
):
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)


def gather_along_first_dim(x: torch.Tensor, group) -> torch.Tensor:
    gathered = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
    return gathered


def reduce_scatter_along_first_dim(x: torch.Tensor, group) -> torch.Tensor:
    scattered = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    dist.reduce_scatter_tensor(scattered, x.contiguous(), group=group)
    return scattered


def allreduce(x: torch.Tensor, group) -> torch.Tensor:
    dist.all_reduce(x, group=group)
    return x
