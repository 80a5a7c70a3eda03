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

from slime_plugins.lora.adapters import base_parameters, iter_adapters, iter_carriers, state_of
from slime_plugins.lora.base import fingerprint
from slime_plugins.lora.checkpoint.storage import Shard, TensorReader
from slime_plugins.lora.layers import frozen_of
from slime_plugins.lora.layers.pieces import Piece, Placement
from slime_plugins.lora.names import in_experts, is_adapter
from slime_plugins.lora.parallel import all_gather, chunks_of
from slime_plugins.lora.projections import Adapter
from slime_plugins.lora.quantize import base_quant_of

_LAYER = re.compile(r"(?:module\.)*decoder\.layers\.\d+")


@dataclass(frozen=True)
class Slot:
    """One adapter parameter of this rank, and where its pieces lie in the checkpoint's tensors."""

    parameter: torch.nn.Parameter
    pieces: tuple[Piece, ...]
    place: Placement

    def state_key(self, piece: Piece) -> str:
        """Of the optimizer's states: one tensor [states, ...], as every record costs 1.6 kB of header."""
        return f"optimizer.state.{piece.name}"

    def extent(self, piece: Piece) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Shape of the whole tensor, and offset and shape of this rank's part."""
        local = tuple(piece.take(self.parameter).shape)
        return (*self.place.extent(piece, local), local)

    def shards(self, states: Sequence[torch.Tensor]) -> Iterator[Shard]:
        """What this rank writes: the weight, and optimizer states of the parameter's shape. Copies to the CPU."""
        for piece in self.pieces:
            if not self.place.writes(piece):
                continue
            whole, offset, _ = self.extent(piece)
            weight = piece.take(self.parameter.detach())
            weight = weight.to("cpu", copy=True, memory_format=torch.contiguous_format)
            yield Shard(piece.name, weight, whole, offset)
            if states:
                stacked = torch.stack([piece.take(state).float() for state in states]).cpu()
                yield Shard(self.state_key(piece), stacked, (len(states), *whole), (0, *offset))

    def read_weight(self, reader: TensorReader) -> torch.Tensor:
        """The parameter's value out of a checkpoint, on the CPU, in the checkpoint's dtype."""
        parts = []
        for piece in self.pieces:
            _, offset, local = self.extent(piece)
            parts.append(reader.read(piece.name, offset, local))
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
        Slot(carrier.lora_parameters()[name], pieces, carrier.lora_placement())
        for carrier in iter_carriers(model)
        for name, pieces in carrier.lora_pieces().items()
    ]


def adapters_of(model) -> dict[str, Adapter]:
    """This rank's adapters by name, experts one by one."""
    specs = [linear.lora for linear in iter_adapters(model)]
    return {one.name: one.record for spec in specs for one in spec.one_by_one()}


def fingerprint_of_model(model) -> dict[str, Any]:
    """The base's sizes and one checksum per layer, equal at every parallelism.

    Computed once for a base, and anew where one of its tensors has been written to or replaced since.

    Collectives:
        an all_gather_object over the world; if anything is new, an all_gather over the (expert-)tensor-parallel groups
        and one all_reduce over the world.
    """
    chunks = chunks_of(model)
    state, marks = state_of(model), _marks(chunks)
    known = state.fingerprint is not None and state.fingerprint[0] == marks
    if not all(all_gather(known)):
        state.fingerprint = marks, _fingerprint(chunks)
    return state.fingerprint[1]


def fingerprint_as_served(model) -> dict[str, Any]:
    """The same of the weights as they multiply: of a 4-bit base, dequantised. Collectives as if all were new."""
    return _fingerprint(chunks_of(model), of_source=False)


def _marks(chunks: Sequence[torch.nn.Module]) -> list[tuple[int, int]]:
    """What changes when a base parameter is written to in place, or gets other memory."""
    return [(parameter.data_ptr(), parameter._version) for _, parameter in base_parameters(chunks)]


def _fingerprint(chunks: Sequence[torch.nn.Module], *, of_source: bool = True) -> dict[str, Any]:
    config = get_model_config(chunks[0])
    layers, sums, experts = [], [], []
    dtype = None
    for chunk in chunks:
        numbers = _layer_numbers(chunk)
        for layer, path, checksum, matrix_dtype in _checksums(chunk, of_source):
            layers.append(numbers[layer])
            sums.append(checksum)
            experts.append(in_experts(path))
            dtype = dtype or matrix_dtype
    totals = torch.zeros(config.num_layers, 2, dtype=torch.int64)
    for number, total in zip(layers, _over_shards(sums, experts)):
        totals[number] += total
    if dist.is_initialized():
        device = torch.cuda.current_device() if dist.get_backend() == "nccl" else "cpu"
        totals = totals.to(device)
        dist.all_reduce(totals)
    quant = base_quant_of(chunks)
    return {
        "architecture": fingerprint.architecture_of_model(config),
        "dtype": str(dtype or config.params_dtype).removeprefix("torch."),
        "layers": {str(n): fingerprint.digits(row) for n, row in enumerate(totals.cpu())},
        **({} if quant is None else {"quantization": quant.to_dict()}),
    }


def _checksums(chunk: torch.nn.Module, of_source: bool) -> Iterator[tuple[str, str, torch.Tensor, torch.dtype]]:
    """Of every matrix of the base in a chunk's decoder layers: path of its layer and module, checksum, dtype."""
    for path, module in chunk.named_modules():
        layer = _LAYER.match(path)
        if not layer:
            continue
        base = frozen_of(module)
        counted = base.parameters if base is not None and base.owns_weights else []
        if base is not None and counted:
            yield from ((layer[0], path, checksum, base.dtype) for checksum in base.checksums(of_source=of_source))
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 2 and not is_adapter(name) and not any(parameter is one for one in counted):
                yield layer[0], path, fingerprint.checksum(parameter), parameter.dtype


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
