"""Adapters merged into a Hugging Face checkpoint: W + scaling * B A, in float32, rounded once. Pure, no Megatron."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import torch

from slime_plugins.lora.base.checkpoint import MERGEABLE, BaseCheckpoint
from slime_plugins.lora.base.rewrite import rewrite
from slime_plugins.lora.projections import Rounding, merge

_ROUNDED_AT_ONCE = 1 << 20  # entries: counting what is lost takes several copies of them, two in float64


class Update(Protocol):
    """What is merged into one matrix: a ``Projection``, or something that reads its values when they are needed."""

    @property
    def name(self) -> str:
        """Of the linear, canonical."""

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]"""

    def update(self) -> torch.Tensor:
        """scaling * B A, float32 [out, in]."""


def merge_weight(weight: torch.Tensor, projection: Update, rounding: Rounding | None = None) -> torch.Tensor:
    """W + scaling * B A in W's dtype, [out, in]; the sum is rounded once.

    Raises:
        ValueError: shapes do not fit, or the result is not finite.
    """
    if tuple(weight.shape) != projection.shape:
        raise ValueError(
            f"{projection.name} is {list(weight.shape)} in the base, its adapter is for {list(projection.shape)}"
        )
    update, merged = projection.update(), torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    rows = max(1, _ROUNDED_AT_ONCE // weight.shape[1])
    for part in zip(weight.split(rows), update.split(rows), merged.split(rows)):
        part[2].copy_(merge(*part[:2], rounding))
        if not torch.isfinite(part[2]).all():
            raise ValueError(f"{projection.name} is not finite after merging")
    return merged


def merge_checkpoint(
    projections: Iterable[Update],
    hf_checkpoint: str | os.PathLike | BaseCheckpoint,
    out_dir: str | os.PathLike,
    *,
    stored: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
    also: Iterable[str] = (),
) -> Rounding:
    """Write a copy of a base checkpoint with adapters merged in, whole or not at all.

    Files, index, tensor order and dtypes stay those of the base, so tied embeddings stay tied; adapted matrices are
    replaced one by one as the bytes stream past: one matrix in memory at a time, beside what the updates hold.

    Args:
        stored: tensor name, value -> what the trained base had in its place (a dequantised matrix), same shape and
            dtype.
        also: names of tensors that it changes beside the adapted ones.
    Raises:
        UsageError: ``hf_checkpoint`` is no checkpoint, or ``out_dir`` holds something.
        ValueError: an adapter that does not fit the base, a base in a dtype that cannot be merged into, or one with a
            file that is a link to elsewhere (those of a Hugging Face cache are followed).
    """
    base, out = BaseCheckpoint.of(hf_checkpoint), Path(out_dir)
    updates = {f"{base.spelled(p.name)}.weight": p for p in projections}
    for name, projection in updates.items():
        _check(name, projection, base)
    rounding = Rounding()

    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        weight = weight if stored is None else stored(name, weight)
        return merge_weight(weight, updates[name], rounding) if name in updates else weight

    rewrite(base, out, {*updates, *also}, change)
    return rounding


def _check(name: str, projection: Update, base: BaseCheckpoint) -> None:
    weight = base.weights.get(name)
    if weight is None or weight.shape != projection.shape:
        has = f"has {list(weight.shape)}" if weight else "has none of that name"
        raise ValueError(
            f"the adapter of {projection.name} is for a {list(projection.shape)} matrix, but {base.directory} {has}; "
            "give the checkpoint that it was trained on"
        )
    if weight.dtype not in MERGEABLE:
        raise ValueError(f"{name} is {weight.dtype} in {base.directory}; merging needs one of {', '.join(MERGEABLE)}")
