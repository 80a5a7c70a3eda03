"""A PEFT adapter merged into its base, one matrix at a time. Pure, no Megatron."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.base.merge import merge_checkpoint
from slime_plugins.lora.peft.directory import validate_adapter
from slime_plugins.lora.peft.read import PeftAdapter
from slime_plugins.lora.peft.rows import with_rows_on
from slime_plugins.lora.projections import Rounding, low_rank_update


@dataclass(frozen=True)
class Merged:
    """What ``merge_adapter`` has done, for people."""

    modules: int
    """Matrices that the adapter changed."""
    compared: str
    """What of the base was compared with what the adapter notes."""
    rounding: Rounding


def merge_adapter(
    adapter_dir: str | os.PathLike,
    hf_checkpoint: str | os.PathLike | BaseCheckpoint,
    out_dir: str | os.PathLike,
    *,
    names: str | None = None,
    **onto: Any,
) -> Merged:
    """Write a copy of the base with the adapter in it, whole or not at all.

    Every changed tensor is PEFT's ``merge_and_unload()`` in float32, rounded once to the base's dtype. Neither the
    base nor the adapter is ever in memory: what is, is one matrix of the base and its pair.

    Args:
        onto: ``stored`` and ``also`` of ``merge_checkpoint``, for a base that trained in another form.
    Raises:
        UsageError: ``hf_checkpoint`` is no checkpoint, or ``out_dir`` holds something.
        ValueError, OSError: the adapter is damaged, is more than lora_A and lora_B, changes nothing, does not fit the
            base, or was made for another one.
    """
    base = BaseCheckpoint.of(hf_checkpoint)
    source = PeftAdapter(adapter_dir, base)
    source.refuse_other_names(names)
    validate_adapter(source.config, source.tensors)
    other, compared = source.tensors.other_base(base, full=True)
    if other:
        raise ValueError(f"{adapter_dir}: {other}")
    updates = [_update(source, module) for module in source.modules]
    rows = source.rows(base)
    if not rows and not any(update.trained for update in updates):
        raise ValueError(f"{adapter_dir}: every lora_B is zero, it is untrained and merging it would give the base")
    what = with_rows_on(rows, base, **onto)
    return Merged(len(updates), compared, merge_checkpoint(updates, base, out_dir, **what))


@dataclass(frozen=True)
class _Update:
    """A ``base.merge.Update`` whose A and B are read when they are needed."""

    source: PeftAdapter
    module: str
    name: str
    shape: tuple[int, int]
    trained: bool

    def update(self) -> torch.Tensor:
        return low_rank_update(*self.source.pair(self.module), self.source.scaling(self.module))


def _update(source: PeftAdapter, module: str) -> _Update:
    A, B = source.pair(module)
    return _Update(source, module, source.canonical(module), (B.shape[0], A.shape[1]), bool(B.any()))
