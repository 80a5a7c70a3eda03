"""Which rows of a Megatron linear are which Hugging Face projection. Pure arithmetic, no process group.

Megatron fuses q, k, v into ``linear_qkv`` and gate, up into ``linear_fc1``. The rows of one projection lie in
``count`` runs of ``length`` rows, ``stride`` apart, in a full weight and in a tensor-parallel shard alike:

    linear_qkv: one run per query group, of h heads of d features
        [q q .. q k v] [q q .. q k v] ...    q: (0, h*d)  k: (h*d, d)  v: (h*d + d, d), stride (h+2)*d
    the same with an output gate: q_proj holds each head's gate too, [q g] head by head where Megatron has
        [q .. q g .. g k v] ...              q: (0, 2*h*d), pieces of widths (d, d) a head, stride (2*h+2)*d
    linear_fc1, gated: one run each, F rows per shard and half
        [gate; up]                           gate: (0, F)  up: (F, F)

A shard of a projection is a contiguous chunk of that projection's Hugging Face rows, so gathering over
tensor-parallel ranks is: take the part, concatenate on dim 0. Concatenating shards of the fused weight itself
interleaves gate and up (design hazard 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from slime_plugins.lora.errors import UsageError


@dataclass(frozen=True)
class Part:
    """Rows of a linear that are one projection: ``count`` runs of ``length`` rows, the first at ``start``."""

    name: str
    """Hugging Face leaf name, for example ``q_proj``."""
    start: int
    length: int
    stride: int
    """Distance in rows between the starts of two runs. With ``count > 1``, ``count * stride`` is all the rows."""
    count: int
    heads: int = 1
    widths: tuple[int, ...] = ()
    """Of the pieces of one head. A run is piece after piece, each of all ``heads`` heads; Hugging Face has head after
    head, each of all pieces. () for a run that is in Hugging Face order."""
    spans: tuple[tuple[int, int], ...] = ()
    """Where shards hold unequal shares: of every shard, the first of its rows in the projection, and their number."""

    @property
    def size(self) -> int:
        """Number of rows."""
        return self.length * self.count

    def run_index(self) -> torch.Tensor:
        """Row numbers in the fused weight, run after run: the order of ``columns``. int64 [size]."""
        runs = torch.arange(self.count)[:, None] * self.stride + self.start
        return (runs + torch.arange(self.length)).reshape(-1)

    def hf_order(self) -> torch.Tensor:
        """Positions in ``run_index`` in Hugging Face order: a permutation, the identity for most. int64 [size]."""
        if not self.widths:
            return torch.arange(self.size)
        pieces = torch.arange(self.length).split([self.heads * width for width in self.widths])
        run = torch.cat([piece.view(self.heads, -1) for piece in pieces], dim=1).reshape(-1)
        return (torch.arange(self.count)[:, None] * self.length + run).reshape(-1)

    def index(self) -> torch.Tensor:
        """Row numbers in the fused weight, in Hugging Face order. int64 [size]."""
        return self.run_index()[self.hf_order()]

    def take(self, weight: torch.Tensor) -> torch.Tensor:
        """Copy this part's rows out of a fused [rows, ...] tensor, in Hugging Face order: [size, ...]."""
        return weight[self.index().to(weight.device)]

    def put(self, weight: torch.Tensor, rows: torch.Tensor) -> None:
        """Write [size, ...] rows, in Hugging Face order, to their places in a fused [rows, ...] tensor."""
        if rows.shape[0] != self.size:
            raise ValueError(f"{self.name}: expected {self.size} rows, got {rows.shape[0]}")
        weight[self.index().to(weight.device)] = rows.to(weight)

    def columns(self, x_NO: torch.Tensor) -> torch.Tensor:
        """View of these output features in a [N, O] activation: [N, size] for one run, else [count, N, length]."""
        if self.count == 1:
            return x_NO[:, self.start : self.start + self.length]
        runs_NCL = x_NO.view(-1, self.count, self.stride)[:, :, self.start : self.start + self.length]
        return runs_NCL.transpose(0, 1)


def whole(name: str, rows: int) -> Part:
    """A linear that is one projection (``linear_proj``, ``linear_fc2``), or a fused one taken as a whole."""
    return Part(name, 0, rows, rows, 1)


def qkv_parts(
    num_heads: int, num_query_groups: int, head_dim: int, names=("q_proj", "k_proj", "v_proj"), gated: bool = False
) -> tuple:
    """Parts of ``linear_qkv``; full counts for a full weight, per-rank counts for a shard.

    Args:
        gated: Megatron's ``attention_output_gate``; the first part holds queries and gates.
    """
    if num_heads % num_query_groups:
        raise ValueError(f"{num_heads} attention heads are not a multiple of {num_query_groups} query groups")
    heads, widths = num_heads // num_query_groups, (head_dim,) * (2 if gated else 1)
    q_rows = heads * sum(widths)
    stride = q_rows + 2 * head_dim
    q, k, v = names
    return (
        Part(q, 0, q_rows, stride, num_query_groups, heads, widths if gated else ()),
        Part(k, q_rows, head_dim, stride, num_query_groups),
        Part(v, q_rows + head_dim, head_dim, stride, num_query_groups),
    )


def cuts_groups(config, shards: int) -> bool:
    """Are there more shards than query groups, so that a shard of ``linear_qkv`` is a piece of one group?"""
    return shards > config.num_query_groups and shards % config.num_query_groups == 0


def parts_of_group_piece(name: str, leaves: tuple[str, ...], rows: int, config, shards: int, shard: int) -> tuple:
    """Parts of a shard of ``linear_qkv`` that is a piece of one query group; some may have no row.

    Megatron gathers the outputs of such shards and takes the heads of each rank out of them. A group is [q .. q k v],
    and a piece of it a run of its rows: so is what it has of q, of k and of v, in Hugging Face's order too.

    Raises:
        UsageError: an output gate, whose rows Hugging Face has in another order, or rows beside q, k and v.
    """
    if getattr(config, "attention_output_gate", False):
        raise UsageError(
            f"tensor-parallel size {shards} cuts through the {config.num_query_groups} query groups of {name}, which "
            f"has an output gate; use one that divides {config.num_query_groups}, or exclude it"
        )
    per_group, d = shards // config.num_query_groups, config.kv_channels
    sizes = (config.num_attention_heads // config.num_query_groups * d, d, d)
    if sum(sizes) != rows * per_group:
        raise UsageError(
            f"{name} has {rows} rows on this rank, not 1/{per_group} of a query group of {sum(sizes)}; extra rows "
            "cannot be adapted; exclude it"
        )
    parts, first = [], 0
    for leaf, size in zip(leaves, sizes):
        cuts = [(i // per_group, i % per_group * rows) for i in range(shards)]
        inside = [
            (group, start, *(min(max(at - first, 0), size) for at in (start, start + rows))) for group, start in cuts
        ]
        spans = tuple((group * size + low, high - low) for group, _, low, high in inside)
        _, start, low, high = inside[shard]
        parts.append(Part(leaf, max(first + low - start, 0), high - low, rows, 1, spans=spans))
        first += size
    return tuple(parts)


def gated_parts(rows: int, names=("gate_proj", "up_proj")) -> tuple:
    """Parts of a gated ``linear_fc1`` (full or shard) of ``rows`` rows: [gate; up]."""
    if rows % 2:
        raise ValueError(f"a gated linear has an even number of rows, got {rows}")
    gate, up = names
    return (Part(gate, 0, rows // 2, rows, 1), Part(up, rows // 2, rows // 2, rows, 1))


def _whole(name: str, leaves: tuple[str, ...], rows: int, config, shards: int) -> tuple[Part, ...]:
    return (whole(leaves[0], rows),)


def _gated(name: str, leaves: tuple[str, ...], rows: int, config, shards: int) -> tuple[Part, ...]:
    if not config.gated_linear_unit:
        raise UsageError(f"{name} is not gated; LoRA export knows gated MLPs (gate_proj, up_proj) only")
    return gated_parts(rows, leaves)


def _qkv(name: str, leaves: tuple[str, ...], rows: int, config, shards: int) -> tuple[Part, ...]:
    if config.num_query_groups % shards:
        raise UsageError(
            f"tensor-parallel size {shards} cuts through the {config.num_query_groups} query groups of {name}; "
            f"use one that divides {config.num_query_groups}"
        )
    parts = qkv_parts(
        config.num_attention_heads // shards,
        config.num_query_groups // shards,
        config.kv_channels,
        leaves,
        gated=getattr(config, "attention_output_gate", False),
    )
    if sum(part.size for part in parts) != rows:
        raise UsageError(
            f"{name} has {rows} rows on this rank, not the {sum(part.size for part in parts)} of q, k and v; "
            "extra rows cannot be adapted; exclude it"
        )
    return parts


ROWS: dict[str, Callable[[str, tuple[str, ...], int, Any, int], tuple[Part, ...]]] = {
    "whole": _whole,
    "gated": _gated,
    "qkv": _qkv,
}
"""Rule of ``names.Linear.rows`` -> the projections of one shard.

Called with the linear's name (for messages), its Hugging Face leaves, the rows of this rank's shard, Megatron's
TransformerConfig, and the number of shards. Raises UsageError for a shard that cannot be taken apart.
"""
