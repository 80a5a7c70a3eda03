"""What a running model contributes to a checkpoint: adapters as shards, the base's fingerprint, the parallelism."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.utils import get_model_config

from slime_plugins.lora.adapters import is_adapter, iter_adapters
from slime_plugins.lora.base import fingerprint as base
from slime_plugins.lora.checkpoint.storage import Shard, TensorReader
from slime_plugins.lora.layers.pieces import Piece, Placement, pieces_of, placement_of
from slime_plugins.lora.names import in_experts
from slime_plugins.lora.projections import Adapter

_LAYER = re.compile(r"(?:module\.)*decoder\.layers\.\d+")


@dataclass(frozen=True)
class Slot:
    """One adapter parameter of this rank, and where its pieces lie in the checkpoint's tensors."""

    parameter: torch.nn.Parameter
    pieces: tuple[Piece, ...]
    place: Placement

    def key(self, piece: Piece) -> str:
        """Of the weight."""
        return f"{piece.linear}.{piece.key}"

    def state_key(self, piece: Piece) -> str:
        """Of the optimizer's states: one tensor [states, ...], as every record costs 1.6 kB of header."""
        return f"optimizer.state.{self.key(piece)}"

    def extent(self, piece: Piece) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Shape of the whole tensor, and offset and shape of this rank's part."""
        local = tuple(piece.take(self.parameter).shape)
        whole, offset = list(local), [0] * len(local)
        if piece.sharded_dim is not None:
            whole[piece.sharded_dim] *= self.place.num_shards
            offset[piece.sharded_dim] = self.place.shard * local[piece.sharded_dim]
        return tuple(whole), tuple(offset), local

    def shards(self, states: Sequence[torch.Tensor]) -> Iterator[Shard]:
        """What this rank writes: the weight, and optimizer states of the parameter's shape. Copies to the CPU."""
        for piece in self.pieces:
            if not self.place.writes(piece):
                continue
            whole, offset, _ = self.extent(piece)
            weight = piece.take(self.parameter.detach())
            weight = weight.to("cpu", copy=True, memory_format=torch.contiguous_format)
            yield Shard(self.key(piece), weight, whole, offset)
            if states:
                stacked = torch.stack([piece.take(state).float() for state in states]).cpu()
                yield Shard(self.state_key(piece), stacked, (len(states), *whole), (0, *offset))

    def read_weight(self, reader: TensorReader) -> torch.Tensor:
        """The parameter's value out of a checkpoint, on the CPU, in the checkpoint's dtype."""
        parts = []
        for piece in self.pieces:
            _, offset, local = self.extent(piece)
            parts.append(reader.read(self.key(piece), offset, local))
        return self._joined(parts)

    def read_states(self, reader: TensorReader, count: int) -> list[torch.Tensor]:
        """The ``count`` optimizer states, each of the parameter's shape, float32 on the CPU."""
        parts = []
        for piece in self.pieces:
            _, offset, local = self.extent(piece)
            parts.append(reader.read(self.state_key(piece), (0, *offset), (count, *local)))
        return [self._joined([part[i] for part in parts]) for i in range(count)]

    def _joined(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        tensor = parts[0].new_empty(self.parameter.shape)
        for piece, part in zip(self.pieces, parts, strict=True):
            piece.put(tensor, part)
        return tensor


def slots_of(model) -> list[Slot]:
    """Every adapter parameter of this rank, in model order."""
    return [
        Slot(linear._parameters[name], pieces, placement_of(linear))
        for linear in iter_adapters(model)
        for name, pieces in pieces_of(linear).items()
    ]


def adapters_of(model) -> dict[str, Adapter]:
    """This rank's adapters by name."""
    return {one.lora.name: one.lora.record for linear in iter_adapters(model) for one in linear.lora_linears()}


def trained_base(model) -> list[str]:
    """Names of this rank's parameters that train and belong to no adapter."""
    return [name for _, name, p in _base_parameters(model) if p.requires_grad]


def _base_parameters(model) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Parameter]]:
    for chunk in model if isinstance(model, (list, tuple)) else [model]:
        for name, parameter in chunk.named_parameters():
            if not is_adapter(name):
                yield chunk, name, parameter


def fingerprint_of_model(model) -> dict[str, Any]:
    """The base's sizes and one checksum per layer, equal at every parallelism.

    Layers whose weights are packed (4-bit) are left out: their bits are not the base's.

    Collectives:
        all_gather over the (expert-)tensor-parallel groups, one all_reduce over the world.
    """
    chunks = list(model) if isinstance(model, (list, tuple)) else [model]
    config = get_model_config(chunks[0])
    numbers = {chunk: _layer_numbers(chunk) for chunk in chunks}
    layers, sums, experts = [], [], []
    packed = torch.zeros(config.num_layers, 1, dtype=torch.int64)
    dtype = None
    for chunk, name, parameter in _base_parameters(chunks):
        match = _LAYER.match(name)
        if match and parameter.dim() == 2:
            layer = numbers[chunk][match[0]]
            if parameter.dtype.is_floating_point:
                layers.append(layer)
                sums.append(base.checksum(parameter))
                experts.append(in_experts(name))
                dtype = dtype or parameter.dtype
            else:
                packed[layer] = 1
    totals = torch.zeros(config.num_layers, 2, dtype=torch.int64)
    for layer, total in zip(layers, _over_shards(sums, experts)):
        totals[layer] += total
    totals = torch.cat([totals, packed], dim=1)
    if dist.is_initialized():
        device = torch.cuda.current_device() if dist.get_backend() == "nccl" else "cpu"
        totals = totals.to(device)
        dist.all_reduce(totals)
    return {
        "architecture": base.architecture_of_model(config),
        "dtype": str(dtype or config.params_dtype).removeprefix("torch."),
        "layers": {str(n): base.digits(row[:2]) for n, row in enumerate(totals.cpu()) if row[2] == 0},
    }


def _layer_numbers(chunk: torch.nn.Module) -> dict[str, int]:
    """Name of a layer in this chunk -> its number over the whole model, from 0."""
    return {name: m.layer_number - 1 for name, m in chunk.named_modules() if _LAYER.fullmatch(name)}


def _over_shards(sums: list[torch.Tensor], experts: list[bool]) -> list[torch.Tensor]:
    """Checksums of whole parameters, on one rank of those that hold them; zeros on the others.

    A parameter that every tensor-parallel rank holds alike is a replica and counts once. Its marks do not tell:
    TransformerEngine marks duplicated weights as shards.
    """
    result = [torch.zeros(2, dtype=torch.int64) for _ in sums]
    for expert in (False, True):
        mine = [i for i, is_expert in enumerate(experts) if is_expert == expert]
        if not mine:
            continue
        local = torch.stack([sums[i] for i in mine])
        shards = _gather_shards(local, expert).cpu()
        if not _first_replica(expert):
            continue
        for n, i in enumerate(mine):
            replicated = bool((shards[:, n] == shards[0, n]).all())
            result[i] = shards[0, n] if replicated else shards[:, n].sum(0)
    return result


def _gather_shards(local: torch.Tensor, expert: bool) -> torch.Tensor:
    """[n, 2] of this rank -> [T, n, 2] of the (expert-)tensor-parallel group."""
    if not dist.is_initialized():
        return local[None]
    group = mpu.get_expert_tensor_parallel_group() if expert else mpu.get_tensor_model_parallel_group()
    shards = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(shards, local, group=group)
    return torch.stack(shards)


def _first_replica(expert: bool) -> bool:
    """Does this rank speak for its parameters: the first of its tensor- and data-parallel groups?"""
    if not dist.is_initialized():
        return True
    if expert:
        return mpu.get_expert_data_parallel_rank() == 0 and mpu.get_expert_tensor_parallel_rank() == 0
    return mpu.get_data_parallel_rank(with_context_parallel=True) == 0 and mpu.get_tensor_model_parallel_rank() == 0


def parallelism() -> dict[str, int]:
    """Sizes that decide which rank holds what."""
    if not dist.is_initialized():
        return {"world": 1, "tp": 1, "pp": 1, "cp": 1, "ep": 1}
    return {
        "world": dist.get_world_size(),
        "tp": mpu.get_tensor_model_parallel_world_size(),
        "pp": mpu.get_pipeline_model_parallel_world_size(),
        "cp": mpu.get_context_parallel_world_size(),
        "ep": mpu.get_expert_model_parallel_world_size(),
    }
