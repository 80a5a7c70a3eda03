"""What a running model contributes to a checkpoint: adapters as shards, the base's fingerprint, the parallelism."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.utils import get_model_config

from slime_plugins.lora.adapters import base_parameters, iter_adapters, iter_carriers, state_of
from slime_plugins.lora.base import fingerprint
from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.base.quantization import BaseQuant
from slime_plugins.lora.base.sums import sums_of_files
from slime_plugins.lora.checkpoint.storage import Shard, TensorReader
from slime_plugins.lora.files.regular import identity
from slime_plugins.lora.layers import Carrier, frozen_of
from slime_plugins.lora.layers.pieces import Piece, Placement
from slime_plugins.lora.names import in_experts, is_adapter
from slime_plugins.lora.parallel import all_gather, chunks_of, everywhere, on_rank_0, rank
from slime_plugins.lora.projections import Adapter
from slime_plugins.lora.quant.dequantize import is_dequantised
from slime_plugins.lora.quant.packed import PackedWeight, dense_of
from slime_plugins.lora.quantize import base_quant_of

_LAYER = re.compile(r"(?:module\.|language_model\.)*decoder\.layers\.\d+")


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
        Slot(carrier.lora_parameters()[name], _held(pieces, carrier), carrier.lora_placement())
        for carrier in iter_carriers(model)
        for name, pieces in carrier.lora_pieces().items()
    ]


def _held(pieces: tuple[Piece, ...], carrier: Carrier) -> tuple[Piece, ...]:
    """Without those of which this rank has no row."""
    shard = carrier.lora_group.rank()
    return tuple(piece for piece in pieces if not piece.spans or piece.spans[shard][1])


def adapters_of(model) -> dict[str, Adapter]:
    """This rank's adapters by name, experts one by one."""
    specs = [linear.lora for linear in iter_adapters(model)]
    return {one.name: one.record for spec in specs for one in spec.one_by_one()}


def fingerprint_of_model(model) -> dict[str, Any]:
    """The base's sizes and one checksum per layer, equal at every parallelism; of a 4-bit base, of what was quantised.

    Computed once for a base, and anew where one of its tensors has been written to or replaced since.

    Collectives:
        an all_gather_object over the world; if anything is new, an all_gather over the (expert-)tensor-parallel groups
        and one all_reduce over the world.
    """
    return _remembered(model, of_source=True)


def _remembered(model, *, of_source: bool) -> dict[str, Any]:
    """``of_source``: False for the weights as they multiply: of a 4-bit base, dequantised."""
    chunks = chunks_of(model)
    fingerprints, marks = state_of(model).fingerprints, _marks(chunks)
    known = of_source in fingerprints and fingerprints[of_source][0] == marks
    if not all(all_gather(known)):
        fingerprints[of_source] = marks, _fingerprint(chunks, of_source=of_source)
    return fingerprints[of_source][1]


def _marks(chunks: Sequence[torch.nn.Module]) -> list[tuple[int, int]]:
    """What changes when a base parameter is written to in place, or gets other memory."""
    return [(parameter.data_ptr(), parameter._version) for _, parameter in base_parameters(chunks)]


def _fingerprint(chunks: Sequence[torch.nn.Module], *, of_source: bool) -> dict[str, Any]:
    config = get_model_config(chunks[0])
    names = [f"{kind}{n}" for kind in ("", "layers.") for n in range(config.num_layers)]
    names += ["embedding", "head", "norm"]
    found, local, dtype = [], [], _dtype_of(chunks)
    for chunk in chunks:
        for name, path, checksum in _base_sums(chunk, dtype, of_source):
            found.append((name, path))
            local.append(checksum)
    sums = _over_shards(local, [in_experts(path) for _, path in found])
    # Sum, sum of squares, how many tensors there are, how many cannot be compared: of every part, over all ranks.
    totals = torch.zeros(len(names), 4, dtype=torch.int64)
    for (name, path), total in zip(found, sums):
        totals[names.index(name)] += torch.cat([total, torch.tensor([1, int(_is_foreign(path))])])
    if dist.is_initialized():
        device = torch.cuda.current_device() if dist.get_backend() == "nccl" else "cpu"
        totals = totals.to(device)
        dist.all_reduce(totals)
    digits = {
        name: fingerprint.digits(row[:2])
        for name, row in zip(names, totals.cpu())
        if name.isdecimal() or (row[2] > 0 and row[3] == 0)
    }
    quant = base_quant_of(chunks) if of_source else None
    return {
        "architecture": fingerprint.architecture_of_model(config),
        "dtype": str(dtype).removeprefix("torch."),
        "layers": {name: value for name, value in digits.items() if name.isdecimal()},
        "rest": {name: value for name, value in digits.items() if not name.isdecimal()},
        "vocab_rows": max(all_gather(_vocab_rows(chunks))),
        "norms": 0 if getattr(config, "layernorm_zero_centered_gamma", False) else 1,
        **({} if quant is None else {"quantization": quant.to_dict()}),
    }


def _dtype_of(chunks: Sequence[torch.nn.Module]) -> torch.dtype:
    """Of the base's first linear in a layer, as it multiplies; what Megatron was told on a stage that has none."""
    for chunk in chunks:
        for path, module in chunk.named_modules():
            base = frozen_of(module) if _LAYER.match(path) else None
            if base is not None and base.owns_weights and base.parameters:
                return base.dtype
    return get_model_config(chunks[0]).params_dtype


def _base_sums(chunk: torch.nn.Module, dtype: torch.dtype, of_source: bool) -> Iterator[tuple[str, str, torch.Tensor]]:
    """As ``_base_parts``, with checksums in place of values; of codes, of what was quantised if ``of_source``."""
    for name, path, tensor in _base_parts(chunk):
        known = tensor.packed.source if of_source and isinstance(tensor, PackedWeight) else None
        yield name, path, fingerprint.checksum(dense_of(tensor).to(dtype)) if known is None else known


def _base_parts(chunk: torch.nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Part of the fingerprint, path of its module, and value, of every tensor of a chunk's base, dense or in codes."""
    numbers = _layer_numbers(chunk)
    for path, module in chunk.named_modules():
        layer = _LAYER.match(path)
        base = frozen_of(module)
        counted = base.parameters if base is not None and base.owns_weights else []
        if base is not None and counted and layer:
            yield from ((str(numbers[layer[0]]), path, matrix) for matrix in base.stored())
        for name, parameter in module.named_parameters(recurse=False):
            if is_adapter(name) or (layer and any(parameter is one for one in counted)):
                continue
            if layer and parameter.dim() <= 2:
                number = numbers[layer[0]]
                yield str(number) if parameter.dim() == 2 else f"layers.{number}", path, parameter
            elif not layer:
                outside = next((part for end, part in _OUTSIDE.items() if path.endswith(end)), None)
                tied_head = outside == "head" and getattr(parameter, "shared_embedding", False)
                if outside is not None and not tied_head:
                    yield outside, path, parameter


_OUTSIDE = {"embedding.word_embeddings": "embedding", "output_layer": "head", "decoder.final_layernorm": "norm"}


def _is_foreign(path: str) -> bool:
    """Is this in a module that slime takes from Hugging Face, whose vectors need not have the checkpoint's dtype?"""
    return ".linear_attn" in path


def _vocab_rows(chunks: Sequence[torch.nn.Module]) -> int:
    """Rows of the whole embedding, with Megatron's padding; 0 on a stage without it."""
    found = (module for chunk in chunks for module in chunk.modules() if isinstance(module, VocabParallelEmbedding))
    return next((module.num_embeddings for module in found), 0)


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


def other_base(model, hf_checkpoint: str | os.PathLike, *, as_served: bool | None = None) -> list[str]:
    """What tells the base of a model from that of a Hugging Face directory; [] if nothing that both sides know does.

    Every file of the directory is read once, the first time, each by one rank. A directory that is quantised in a form
    that is not read is not comparable: [], but no base of a 4-bit model.

    Args:
        as_served: of a 4-bit base, compare its dequantised weights, and not those that it was made of. Default: it may
            be either.
    Collectives:
        those of ``fingerprint_of_model``, a broadcast_object_list, some all_gather_object over the world.
    Raises:
        UsageError, ValueError, OSError: on every rank, a directory that is none, or is damaged.
    """
    base = everywhere(lambda: BaseCheckpoint(hf_checkpoint))
    quant = base_quant_of(model)
    if base.quantised is not None:
        return [] if quant is None else [f"its weights are stored as {base.quantised}, which no 4-bit base is made of"]
    if quant is None or as_served is not None:
        return _differences(model, base, of_source=not as_served)
    made_of = _differences(model, base, of_source=True)
    served = _differences(model, base, of_source=False) if made_of else []
    return served and (served if on_rank_0(lambda: is_dequantised(base.directory)) else made_of)


def stored_as(model, hf_checkpoint: str | os.PathLike) -> BaseQuant | None:
    """What a directory's weights, those of the model's base, must be stored as to be that base; None: as they are.

    Collectives, errors: those of ``other_base``.
    """
    quant = base_quant_of(model)
    if quant is None or everywhere(lambda: BaseCheckpoint(hf_checkpoint)).coded:
        return quant
    return quant if other_base(model, hf_checkpoint, as_served=True) else None


def _differences(model, base: BaseCheckpoint, *, of_source: bool) -> list[str]:
    # What it is stored as while training is no fact of the files.
    ours = {**_remembered(model, of_source=of_source), "quantization": None}
    state, layers = state_of(model), [int(number) for number in ours["layers"]]
    about = on_rank_0(lambda: (ours["dtype"], layers, [(str(path), identity(os.stat(path))) for path in base.files]))
    if state.compared is None or state.compared[0] != about:
        world = dist.get_world_size() if dist.is_initialized() else 1
        mine = everywhere(lambda: sums_of_files(base, ours["dtype"], base.files[rank() :: world]))
        sums = {name: found for part in all_gather(mine) for name, found in part.items()}
        theirs = everywhere(lambda: fingerprint.fingerprint_of_hf(base, ours["dtype"], layers, sums))
        state.compared = about, theirs
    return fingerprint.differences(state.compared[1], ours)
