"""Between a rank's shards and whole tensors in Hugging Face order: the one translator, of checkpoints and both ends.

An adapter parameter is taken apart into pieces: by projection, since rows of a fused B must not be cut as they lie on
a rank (a shard of [gate; up] is [gate_i; up_i], and laying such shards one after the other interleaves the two when
the tensor-parallel size changes, design hazard 1), and stacked experts one by one. Cut so, every shard is a plain
slice of its whole tensor (see ``layout``), of equal shares but where there are more ranks than key/value heads. Keys
are those of ``projections``; an expert's tensors are its own, under its number in the whole layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from slime_plugins.lora.layers.spec import AdapterSpec
from slime_plugins.lora.parameters import AdapterParameter
from slime_plugins.lora.projections import piece_key


@dataclass(frozen=True)
class Piece:
    """The part of an adapter parameter that is one tensor of a checkpoint: some rows, of one expert if stacked."""

    linear: str
    """Global Megatron name; of the one expert's linear."""
    key: str
    """After the linear's name: ``lora_A``, ``lora_B.q_proj``, ..."""
    rows: slice | torch.Tensor
    """In the parameter, or in any tensor of its shape (gradient, optimizer state), on this rank."""
    expert: int | slice | None
    """Position in the parameter's first dimension, where experts are stacked; ``slice(None)``: all of them."""
    sharded_dim: int | None
    """Dimension of the piece that is cut over tensor-parallel ranks; None: each holds it all."""
    spans: tuple[tuple[int, int], ...] = ()
    """Where it is not cut into equal shares: as ``layout.Part.spans``."""

    @property
    def name(self) -> str:
        """Of the whole tensor."""
        return f"{self.linear}.{self.key}"

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """This piece of a tensor of the parameter's shape, a view or a copy."""
        return tensor[self._index]

    def put(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """The inverse of ``take``, in place."""
        tensor[self._index] = value.to(tensor)

    @property
    def _index(self) -> Any:
        return self.rows if self.expert is None else (self.expert, self.rows)

    def joined(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole out of every rank's part."""
        assert self.sharded_dim is not None
        return torch.cat(list(parts), dim=self.sharded_dim + isinstance(self.expert, slice))


@dataclass(frozen=True)
class Placement:
    """Where this rank stands among those that hold the same adapter."""

    shard: int
    """Tensor-parallel rank."""
    num_shards: int
    replica: int
    """Rank among those with equal parameters: data (and context) parallel, for experts expert-data-parallel."""
    group: Any = None
    """The tensor-parallel group."""

    def writes(self, piece: Piece) -> bool:
        """Does this rank write its part of a piece? Exactly one rank does, however many replicas there are."""
        return self.replica == 0 and (piece.sharded_dim is not None or self.shard == 0)

    def extent(self, piece: Piece, local: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape of the whole tensor of a piece, and the offset of this rank's part, of shape ``local``."""
        whole, offset = list(local), [0] * len(local)
        if piece.spans:
            whole[0], offset[0] = sum(rows for _, rows in piece.spans), piece.spans[self.shard][0]
        elif piece.sharded_dim is not None:
            whole[piece.sharded_dim] *= self.num_shards
            offset[piece.sharded_dim] = self.shard * local[piece.sharded_dim]
        return tuple(whole), tuple(offset)

    def gather(self, pieces: Sequence[Piece], tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The whole of all pieces of a parameter, by their names, out of every rank's tensor of its shape.

        Collectives:
            one all_gather over the group, however many pieces; one per piece where shares are unequal.
        """
        if self.num_shards == 1 or all(piece.sharded_dim is None for piece in pieces):
            return {piece.name: piece.take(tensor) for piece in pieces}
        if any(piece.spans for piece in pieces):
            return {piece.name: self._gather_unequal(piece, piece.take(tensor)) for piece in pieces}
        shards = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.num_shards)]
        dist.all_gather(shards, tensor.contiguous(), group=self.group)
        return {piece.name: piece.joined([piece.take(shard) for shard in shards]) for piece in pieces}

    def _gather_unequal(self, piece: Piece, part: torch.Tensor) -> torch.Tensor:
        longest = max(rows for _, rows in piece.spans)
        padded = torch.nn.functional.pad(part, (0, 0, 0, longest - part.shape[0])).contiguous()
        parts = [torch.empty_like(padded) for _ in piece.spans]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:rows] for part, (_, rows) in zip(parts, piece.spans)])

    def part_of(self, piece: Piece, whole: torch.Tensor) -> torch.Tensor:
        """The inverse: this rank's part of the whole."""
        if piece.sharded_dim is None:
            return whole
        if piece.spans:
            first, rows = piece.spans[self.shard]
            return whole[first : first + rows]
        return whole.chunk(self.num_shards, dim=piece.sharded_dim)[self.shard]


def pieces_of(table: Sequence[AdapterParameter], spec: AdapterSpec) -> dict[str, tuple[Piece, ...]]:
    """Parameter name -> its pieces, which cover it."""
    numbers = [None] if spec.experts is None else range(len(spec.experts))
    experts = list(zip(numbers, spec.one_by_one()))
    return {
        parameter.name: tuple(piece for number, one in experts for piece in _pieces(parameter, one, number))
        for parameter in table
    }


def stacked_pieces(table: Sequence[AdapterParameter], spec: AdapterSpec) -> dict[str, tuple[Piece, ...]]:
    """The same with the experts left together, so that their number costs nothing: tensors [E, ...] of each piece.

    ``sharded_dim`` is counted within one expert's tensor, and the linear is the stacked one.
    """
    every = None if spec.experts is None else slice(None)
    return {parameter.name: tuple(_pieces(parameter, spec, every)) for parameter in table}


def _pieces(parameter: AdapterParameter, spec: AdapterSpec, expert: int | slice | None) -> Iterator[Piece]:
    def piece(leaf: str | None, rows: slice | torch.Tensor, spans: tuple[tuple[int, int], ...] = ()) -> Piece:
        return Piece(spec.name, piece_key(parameter.name, leaf), rows, expert, parameter.sharded_dim, spans)

    if parameter.rows == "whole" or (parameter.rows == "stacked" and not spec.split):
        yield piece(None, slice(None))
        return
    for i, part in enumerate(spec.parts):
        stacked = slice(i * spec.rank, (i + 1) * spec.rank)
        if parameter.rows == "stacked":
            yield piece(part.name, stacked)
        else:
            yield piece(part.name, spec.rows_of(i), part.spans)


def adapter_sharded_tensors(carrier, prefix: str, sharded_offsets: tuple = ()) -> dict:
    """Entries of Megatron's ``sharded_state_dict`` for an adapter's parameters, under their state-dict names.

    ``sharded_offsets``: Megatron stacks equal layers along a first dimension. Not every layer need be adapted, and
    ranks may differ, so here the position in the stack becomes part of the key instead.
    """
    place = carrier.lora_placement()
    stack = "".join(f"{index}." for _, index, _ in sharded_offsets)
    entries = {}
    for name, pieces in carrier.lora_pieces().items():
        if any(piece.spans for piece in pieces):
            raise ValueError(
                f"{pieces[0].linear}: Megatron's checkpoints hold equal shares, and with more tensor-parallel ranks "
                "than key/value heads these are not; save the adapters with save_adapter"
            )
        parameter = carrier.lora_parameters()[name]
        entries[prefix + name] = ShardedTensorFactory(
            f"{prefix}{stack}",
            parameter,
            partial(_build, pieces, place),
            partial(_merge, pieces, parameter.shape),
            replica_id=(0, place.shard, place.replica),
        )
    return entries


@torch.no_grad()
def _build(pieces, place: Placement, key: str, tensor: torch.Tensor, replica_id, flattened_range=None) -> dict:
    """``flattened_range``: Megatron's signature; it has stopped flattening."""
    built = {}
    for piece in pieces:
        sharded = piece.sharded_dim is not None
        built[_state_key(piece)] = ShardedTensor.from_rank_offsets(
            key + _state_key(piece),
            piece.take(tensor).contiguous(),
            *([(piece.sharded_dim, place.shard, place.num_shards)] if sharded else []),
            replica_id=(0, 0, replica_id[2]) if sharded else replica_id,
        )
    return built


@torch.no_grad()
def _merge(pieces, shape: torch.Size, state: dict) -> torch.Tensor:
    tensor = next(iter(state.values())).new_empty(shape)
    for piece in pieces:
        piece.put(tensor, state[_state_key(piece)])
    return tensor


def _state_key(piece: Piece) -> str:
    """Unique within one adapted linear: experts by their number in the whole layer."""
    return piece.key if piece.expert is None else f"{piece.linear.rsplit('.', 2)[-2]}.{piece.key}"
