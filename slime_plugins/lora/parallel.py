"""Agreement between ranks: what one of them finds wrong, all of them raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


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


def gather(value: T) -> list[T] | None:
    """``value`` of every rank on rank 0; None on the others. Collective over the world."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, gathered, dst=0)
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
    return result


def on_rank_0(fn: Callable[[], T]) -> T:
    """Run ``fn`` on rank 0 alone; its result, or its error, on every rank."""
    outcome = attempt(fn) if rank() == 0 else None
    if dist.is_initialized():
        box = [outcome]
        dist.broadcast_object_list(box, src=0)
        outcome = box[0]
    result, problem = outcome
    if problem is not None:
        raise problem
    return result
