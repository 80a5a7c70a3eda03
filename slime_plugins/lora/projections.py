"""Adapters whole, in Hugging Face order: of one projection, and of one linear as a checkpoint holds it. No Megatron.

A linear's adapter is the same tensors at every parallelism, by keys after the linear's name:

    lora_A            [rank, I]      one A for all projections (layout fused)
    lora_A.q_proj     [rank, I]      an A of its own (layout split)
    lora_B.q_proj     [rows, rank]   one tensor per projection in either layout
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from slime_plugins.lora.names import hf_names


@dataclass(frozen=True)
class Projection:
    """The whole adapter of one Hugging Face linear, gathered from every shard."""

    name: str
    """``model.layers.3.self_attn.q_proj``, layer counted over the whole model."""
    A: torch.Tensor
    """[rank, in]"""
    B: torch.Tensor
    """[out, rank], rows in Hugging Face order."""
    scaling: float
    """Factor on B A."""

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the weight that it changes."""
        return (self.B.shape[0], self.A.shape[1])

    def update(self) -> torch.Tensor:
        """scaling * B A, float32 [out, in]."""
        return low_rank_update(self.A, self.B, self.scaling)


@dataclass(frozen=True)
class Adapter:
    """What the adapter of one linear computes, apart from its values."""

    projections: tuple[str, ...]
    """Adapted Hugging Face leaves, in the order of the fused rows."""
    ranks: tuple[int, ...]
    """Of each projection."""
    scalings: tuple[float, ...]
    """Factor on B A of each projection."""
    layout: str
    """``fused`` or ``split``; a linear that is one projection is ``fused``."""

    def whole(self, linear: str, read: Callable[[str], torch.Tensor]) -> Iterator[Projection]:
        """Its projections, one at a time; of stacked experts together, with A [E, rank, in] and B [E, out, rank].

        Args:
            linear: global Megatron name.
            read: key -> the whole tensor.
        Raises:
            ValueError: values in the padding of a narrower projection, which must contribute nothing.
        """
        full_names = {full.rsplit(".", 1)[-1]: full for full in hf_names(linear)}
        for leaf, rank, scaling in zip(self.projections, self.ranks, self.scalings):
            A, B = read(piece_key("lora_A", leaf if self.layout == "split" else None)), read(piece_key("lora_B", leaf))
            if A.shape[-2] > rank and _both_beyond(A, B, rank):
                raise ValueError(f"{full_names[leaf]} has rank {rank}, but values beyond it")
            yield Projection(full_names[leaf], A[..., :rank, :].clone(), B[..., :rank].clone(), scaling)

    def tensors(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The inverse: keys -> whole tensors, out of the projections' (A, B). Of a split layout padded to one rank.

        In a fused layout the pairs share their A.
        """
        rank, pad = max(self.ranks), torch.nn.functional.pad
        found = {} if self.layout == "split" else {piece_key("lora_A"): pairs[0][0]}
        for leaf, (A, B) in zip(self.projections, pairs):
            missing = rank - A.shape[0]
            if self.layout == "split":
                found[piece_key("lora_A", leaf)] = pad(A, (0, 0, 0, missing))
            found[piece_key("lora_B", leaf)] = pad(B, (0, missing))
        return found


def _both_beyond(A: torch.Tensor, B: torch.Tensor, rank: int) -> bool:
    """Has a matrix, or one of a stack, values beyond its rank in A and in B, so that they add to the product?"""
    return bool((A[..., rank:, :].flatten(-2).any(-1) & B[..., rank:].flatten(-2).any(-1)).any())


def piece_key(parameter: str, leaf: str | None = None) -> str:
    """``lora_B``, ``q_proj`` -> ``lora_B.q_proj``; without a leaf, the parameter is one tensor."""
    return parameter if leaf is None else f"{parameter}.{leaf}"


def low_rank_update(A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
    """scaling * B A, float32 [out, in], for A [rank, in] and B [out, rank]."""
    return (B.float() @ A.float()).mul_(scaling)


@dataclass
class Rounding:
    """What rounding to the base's dtype did to an update, over any number of matrices.

    The sums stay on the matrices' device until they are asked for.
    """

    entries: int = 0
    unchanged: int | torch.Tensor = 0
    """Entries of the update that are not zero and left their weight as it was."""
    size: float | torch.Tensor = 0.0
    """Sum of |update|."""
    lost: float | torch.Tensor = 0.0
    """Sum of |update| over the unchanged entries."""

    def add(self, weight: torch.Tensor, update: torch.Tensor, merged: torch.Tensor) -> None:
        """Count one matrix. ``update`` in float32; ``weight`` and ``merged`` in the base's dtype."""
        magnitude = update.abs()
        kept_old = (merged == weight) & (magnitude > 0)
        self.entries += update.numel()
        self.unchanged = self.unchanged + kept_old.sum()
        self.size = self.size + magnitude.sum(dtype=torch.float64)
        self.lost = self.lost + magnitude.masked_fill_(~kept_old, 0).sum(dtype=torch.float64)

    @property
    def lost_share(self) -> float:
        """Share of the update, by size, that changed nothing, in [0, 1]."""
        size = float(self.size)
        return float(self.lost) / size if size else 0.0


def merge(weight: torch.Tensor, update: torch.Tensor, rounding: Rounding | None = None) -> torch.Tensor:
    """W' = W + update in W's dtype, in new memory: added in float32, rounded once. The one formula of all merging.

    Args:
        update: float32, W's shape.
    """
    merged = update.add(weight).to(weight.dtype)
    if rounding is not None:
        rounding.add(weight, update, merged)
    return merged
