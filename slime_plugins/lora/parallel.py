"""Chunks, groups, and agreement between ranks: what one of them finds wrong, all of them raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state

T = TypeVar("T")


def chunks_of(model: Any) -> list[torch.nn.Module]:
    """The pipeline chunks of this rank, of a module or a list of chunks, wrapped or not."""
    return list(model) if isinstance(model, (list, tuple)) else [model]


def unwrapped(chunk: torch.nn.Module) -> torch.nn.Module:
    """A chunk without DDP and Float16Module around it."""
    while isinstance(getattr(chunk, "module", None), torch.nn.Module):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


def model_parallel() -> bool:
    """Has Megatron made its groups?"""
    return dist.is_initialized() and parallel_state.model_parallel_is_initialized()


def pipeline_group() -> Any:
    """The pipeline group if there is more than one stage, else None."""
    return _if_several(parallel_state.get_pipeline_model_parallel_group) if model_parallel() else None


def expert_group() -> Any:
    """The expert-parallel group if experts are spread over ranks, else None."""
    return _if_several(parallel_state.get_expert_model_parallel_group) if model_parallel() else None


def _if_several(get_group: Callable[[], Any]) -> Any:
    group = get_group()
    return group if group.size() > 1 else None


def all_gather_over(group: Any, value: T) -> list[T]:
    """``value`` of every rank of a group, in its order; of this rank alone for None. Collective over the group."""
    if group is None:
        return [value]
    gathered: list[Any] = [None] * group.size()
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def gather_on_first(items: list[T], group: Any) -> list[T] | None:
    """The items of all ranks of a group, in rank order, on its first; None on the others. Collective."""
    if group is None:
        return items
    gathered: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
    dist.gather_object(items, gathered, dst=dist.get_global_rank(group, 0), group=group)
    return None if gathered is None else [item for items in gathered for item in items]


def rank() -> int:
    """Global rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_gather(value: T) -> list[T]:
    """``value`` of every rank, in rank order. Collective over the world."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def gather(value: T) -> list[T]:
    """``value`` of every rank on rank 0; [] on the others. Collective over the world."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(value, gathered or None, dst=0)
    return gathered


def attempt(fn: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """The result of a step that may fail for a user's reason (ValueError, OSError), or that reason."""
    try:
        return fn(), None
    except (ValueError, OSError) as error:
        return None, error


def everywhere(fn: Callable[[], T]) -> T:
    """Run ``fn`` on every rank; returns this rank's own result, or raises the first error of any rank, on all."""
    result, problem = attempt(fn)
    for other in all_gather(problem):
        if other is not None:
            raise other
    return cast(T, result)


def on_rank_0(fn: Callable[[], T]) -> T:
    """Run ``fn`` on rank 0 alone; its result, or its error, on every rank."""
    box = [attempt(fn) if rank() == 0 else (None, None)]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    result, problem = box[0]
    if problem is not None:
        raise problem
    return cast(T, result)
