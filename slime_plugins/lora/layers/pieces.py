"""How one adapter lies in a checkpoint: which tensors it is, and which part of each this rank holds.

An adapter is the same tensors at every parallelism, whole and in Hugging Face row order:

    lora_A            [rank, I]      one A for all projections (layout fused)
    lora_A.q_proj     [rank, I]      an A of its own (layout split)
    lora_B.q_proj     [rows, rank]   one tensor per projection in either layout

Stacked experts are taken apart: an expert's tensors are its own, under its number in the whole layer.

Rows of a fused B must not be cut as they lie on a rank: a shard of [gate; up] is [gate_i; up_i], and laying such
shards one after the other interleaves the two when the tensor-parallel size changes (design hazard 1). Cut by
projection, every shard is a plain slice of its tensor (see ``layout``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from slime_plugins.lora.layers.spec import AdapterSpec


@dataclass(frozen=True)
class Piece:
    """The part of an adapter parameter that is one tensor of a checkpoint: some rows, of one expert if stacked."""

    linear: str
    """Global Megatron name; of the one expert's linear."""
    key: str
    """After the linear's name: ``lora_A``, ``lora_B.q_proj``, ..."""
    rows: slice | torch.Tensor
    """In the parameter, or in any tensor of its shape (gradient, optimizer state), on this rank."""
    expert: int | None
    """Position in the parameter's first dimension, where experts are stacked."""
    sharded_dim: int | None
    """Dimension of the [rows, columns] matrix that is cut over tensor-parallel ranks; None: each holds it all."""

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """This piece of a tensor of the parameter's shape: [rows, columns], a view or a copy."""
        return (tensor if self.expert is None else tensor[self.expert])[self.rows]

    def put(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """The inverse of ``take``, in place."""
        (tensor if self.expert is None else tensor[self.expert])[self.rows] = value.to(tensor)


@dataclass(frozen=True)
class Placement:
    """Where this rank stands among those that hold the same adapter."""

    shard: int
    """Tensor-parallel rank."""
    num_shards: int
    replica: int
    """Rank among those with equal parameters: data (and context) parallel, for experts expert-data-parallel."""

    def writes(self, piece: Piece) -> bool:
        """Does this rank write its part of a piece? Exactly one rank does, however many replicas there are."""
        return self.replica == 0 and (piece.sharded_dim is not None or self.shard == 0)


def pieces_of(linear) -> dict[str, tuple[Piece, ...]]:
    """Parameter name -> its pieces, which cover it."""
    pieces: dict[str, list[Piece]] = {"lora_A": [], "lora_B": []}
    for i, one in enumerate(linear.lora_linears()):
        expert = None if linear.lora.experts is None else i
        for piece in _pieces_of_spec(one.lora, expert):
            pieces[piece.key.partition(".")[0]].append(piece)
    return {name: tuple(found) for name, found in pieces.items()}


def _pieces_of_spec(spec: AdapterSpec, expert: int | None) -> Iterator[Piece]:
    A_dim = {"row": 1}.get(spec.parallel)
    B_dim = {"column": 0}.get(spec.parallel)
    if not spec.split:
        yield Piece(spec.name, "lora_A", slice(None), expert, A_dim)
    for i, part in enumerate(spec.parts):
        if spec.split:
            yield Piece(spec.name, f"lora_A.{part.name}", slice(i * spec.rank, (i + 1) * spec.rank), expert, A_dim)
        yield Piece(spec.name, f"lora_B.{part.name}", spec.rows_of(i), expert, B_dim)


def placement_of(linear) -> Placement:
    """This rank's place for one adapted linear."""
    group = linear.lora_tp_group
    if getattr(linear.lora_A, "allreduce", True):
        replica = mpu.get_data_parallel_rank(with_context_parallel=True)
    else:
        replica = mpu.get_expert_data_parallel_rank()
    return Placement(group.rank(), group.size(), replica)


def adapter_sharded_tensors(linear, prefix: str, sharded_offsets: tuple = ()) -> dict:
    """Entries of Megatron's ``sharded_state_dict`` for ``lora_A`` and ``lora_B``, under their state-dict names.

    ``sharded_offsets``: Megatron stacks equal layers along a first dimension. Not every layer need be adapted, and
    ranks may differ, so here the position in the stack becomes part of the key instead.
    """
    place = placement_of(linear)
    stack = "".join(f"{index}." for _, index, _ in sharded_offsets)
    entries = {}
    for name, pieces in pieces_of(linear).items():
        parameter = linear._parameters[name]
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
