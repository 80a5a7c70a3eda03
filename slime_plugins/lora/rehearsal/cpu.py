"""Megatron-Core on gloo and host memory: stand-ins for the ``torch.cuda`` calls that it makes unconditionally.

Only for processes that ask for it with ``enable()``, before they import ``megatron``. Everything that computes is
Megatron's own code; what is replaced is where a tensor lives, streams, events, and the device's random state (on a
CPU: the one CPU generator, so that Megatron's RNG tracker and activation recomputation work as written).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import types
from typing import Any

import torch

_CPU = torch.device("cpu")
_torch: Any = torch
"""The module to put stand-ins in: what is replaced has types of its own, which a stand-in cannot have."""
_FACTORIES = (
    "arange as_tensor empty empty_like empty_strided eye full full_like linspace ones ones_like rand rand_like "
    "randint randn randn_like randperm tensor zeros zeros_like"
)
_METHODS = "new_empty new_full new_ones new_tensor new_zeros to"
_NO_OPS = "empty_cache init ipc_collect manual_seed_all reset_peak_memory_stats set_device synchronize"


class _Stream:
    """A CUDA stream or event on a machine where every operation has finished when it returns."""

    def __init__(self, *args, **kwargs):
        pass

    def elapsed_time(self, other) -> float:
        return 0.0

    def query(self) -> bool:
        return True

    def record_event(self, event=None):
        return event or _Stream()

    def record(self, *args):
        pass

    synchronize = wait = wait_event = wait_stream = record


def enable() -> bool:
    """Let this process run Megatron-Core without a GPU. True if the stand-ins are active afterwards.

    Does nothing and returns False where CUDA is available. A second call changes nothing.
    """
    if getattr(torch.cuda, "_slime_lora_cpu", False):
        return True
    if torch.cuda.is_available():
        return False
    tensor = _torch.Tensor
    for name in _FACTORIES.split():
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in _METHODS.split():
        setattr(tensor, name, _on_cpu(getattr(tensor, name)))
    tensor.type = _type_as_on_gpu(tensor.type)
    tensor.cuda = _torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    tensor.pin_memory = lambda self, *args: self
    tensor.record_stream = lambda self, stream: None
    # torch.compile would call a C++ compiler in every process, and importing it is half of Megatron's import time.
    _torch.compile = lambda model=None, **kwargs: (lambda fn: fn) if model is None else model
    _replace_cuda()
    _teach_gloo()
    return True


def _replace_cuda() -> None:
    cuda = _torch.cuda
    for name in _NO_OPS.split():
        # One function per name: torch's own tables refuse a function that is registered twice.
        setattr(cuda, name, lambda *args, **kwargs: None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda *args, **kwargs: 0)
    cuda.current_device = lambda: _CPU
    cuda.device_count = lambda: 1
    cuda.get_device_capability = lambda device=None: (8, 0)
    cuda.get_device_properties = lambda device=None: types.SimpleNamespace(name="cpu", major=8, minor=0)
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = cuda.default_stream = lambda device=None: _Stream()
    cuda.stream = cuda.device = lambda target: contextlib.nullcontext()
    cuda.nvtx.range_push, cuda.nvtx.range_pop = lambda message: None, lambda: None

    def get_rng_state(*args, **kwargs) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(new_state: torch.Tensor, *args, **kwargs) -> None:
        torch.set_rng_state(new_state)

    cuda.get_rng_state = cuda.random.get_rng_state = get_rng_state
    cuda.set_rng_state = cuda.random.set_rng_state = set_rng_state
    # Not torch.manual_seed: that one seeds the devices too, through these very functions.
    cuda.manual_seed = torch.default_generator.manual_seed
    cuda._slime_lora_cpu = True
    # Megatron sets device states through torch's C bindings.
    megatron_random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    megatron_random._get_cuda_rng_state, megatron_random._set_cuda_rng_state = get_rng_state, set_rng_state


def _teach_gloo() -> None:
    """What Megatron's token dispatcher asks of NCCL: ranks with different numbers of tokens, and splits as tensors."""
    dist = _torch.distributed
    all_gather, reduce_scatter, all_to_all_single = dist.all_gather, dist.reduce_scatter, dist.all_to_all_single

    def is_uneven(tensors) -> bool:
        return len({t.shape for t in tensors}) > 1

    @functools.wraps(all_gather)
    def gather(tensor_list, tensor, group=None, async_op=False):
        if not is_uneven(tensor_list):
            return all_gather(tensor_list, tensor, group=group, async_op=async_op)
        for rank, gathered in enumerate(tensor_list):
            if rank == dist.get_rank(group):
                gathered.copy_(tensor)
            dist.broadcast(gathered, group=group, group_src=rank)
        return None

    @functools.wraps(reduce_scatter)
    def scatter(output, input_list, op=dist.ReduceOp.SUM, group=None, async_op=False):
        if not is_uneven(input_list):
            return reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
        for rank, tensor in enumerate(input_list):
            summed = tensor.clone()
            dist.all_reduce(summed, op=op, group=group)
            if rank == dist.get_rank(group):
                output.copy_(summed)
        return None

    @functools.wraps(all_to_all_single)
    def to_all(output, input, output_split_sizes=None, input_split_sizes=None, **kwargs):
        splits = (s.tolist() if isinstance(s, torch.Tensor) else s for s in (output_split_sizes, input_split_sizes))
        return all_to_all_single(output, input, *splits, **kwargs)

    dist.all_gather, dist.reduce_scatter, dist.all_to_all_single = gather, scatter, to_all


def _on_cpu(fn):
    """``fn`` with every CUDA device among its arguments replaced."""

    def moved(value):
        if isinstance(value, str) and value.startswith("cuda"):
            return _CPU
        return _CPU if isinstance(value, torch.device) and value.type == "cuda" else value

    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        if "device" in kwargs:
            kwargs["device"] = moved(kwargs["device"])
        kwargs.pop("pin_memory", None)
        if len(args) > 1:  # Tensor.to(device)
            args = (args[0], moved(args[1]), *args[2:])
        return fn(*args, **kwargs)

    return wrapper


def _type_as_on_gpu(real):
    """``Tensor.type`` that answers ``torch.cuda.FloatTensor``: DistributedOptimizer compares that string."""

    @functools.wraps(real)
    def wrapper(self, dtype=None, *args, **kwargs):
        if dtype is not None:
            return real(self, dtype, *args, **kwargs)
        return real(self).replace("torch.", "torch.cuda.", 1)

    return wrapper
