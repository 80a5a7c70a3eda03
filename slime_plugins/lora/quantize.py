"""Store the base of a model as 4-bit codes: which linears, and the collective that gives them nested scales.

The bits are those of one process that quantises the whole checkpoint: codes and scales of a shard are slices of the
full matrix's, and nested scales are computed on all scales of one Hugging Face projection, gathered.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from slime_plugins.lora.adapters import has_adapters
from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.base.fingerprint import checksum
from slime_plugins.lora.base.quantization import BLOCK, GROUP, BaseQuant, check_blocks, is_excluded
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.files.safetensors import torch_dtype
from slime_plugins.lora.layers import FrozenLinear, frozen_of
from slime_plugins.lora.layout import ROWS, Part
from slime_plugins.lora.names import hf_names, is_known, of_expert, record_of
from slime_plugins.lora.parallel import (
    all_gather,
    all_gather_over,
    attempt,
    chunks_of,
    everywhere,
    pipeline_group,
    unwrapped,
)
from slime_plugins.lora.quant import nf4
from slime_plugins.lora.quant.codes import check_codes, in_codes
from slime_plugins.lora.quant.hold import hold
from slime_plugins.lora.quant.packed import Packed, PackedWeight
from slime_plugins.lora.targets import check_all_matched, short_name

_LAYER = re.compile(r"^(?:module\.)*(decoder\.layers\.)(\d+)\.(.+)$")
_EXPERT = re.compile(r"\.(?:local_experts\.)?\d+(?=\.linear_fc[12]$)")


@dataclass(frozen=True)
class QuantReport:
    """What ``quantize_base`` did on this rank."""

    matrices: int
    parameters: int
    packed_bytes: int
    dense_bytes: int
    """What the same matrices took before."""
    excluded: tuple[str, ...] = ()
    """Linears that were left dense because ``exclude`` names them."""

    def __str__(self) -> str:
        per = self.packed_bytes / max(self.parameters, 1)
        return (
            f"base in 4 bits: {self.matrices} matrices of this rank, {self.parameters:,} parameters, "
            f"{self.packed_bytes / 2**20:.1f} MiB ({per:.4f} bytes each) instead of {self.dense_bytes / 2**20:.1f} MiB"
        )


def quantize_base(
    model: Any, quant: BaseQuant | None = None, *, codes_of: str | os.PathLike | None = None
) -> QuantReport:
    """Store every decoder linear of a loaded model as NF4 codes, in place. Before or after ``apply_lora``, before DDP.

    Names and shapes of parameters stay; what multiplies from then on is the dequantised weight, the same bits at every
    parallelism and in transformers + bitsandbytes. Embeddings, output layer, norms, biases, routers and multi-token
    prediction stay as they are.

    Args:
        model: a Megatron module, or the list of this rank's pipeline chunks, its weights loaded, in the dtype in which
            it trains.
        quant: the form; NF4 with nested scales by default.
        codes_of: the checkpoint that the weights were loaded from, where that holds them in NF4 codes (bitsandbytes):
            the model gets those codes, and not new ones. Of a dense checkpoint it changes nothing.
    Collectives:
        objects over the world and the pipeline group; per matrix an all_gather over its tensor-parallel group.
    Raises:
        UsageError: bitsandbytes is missing, a linear that does not divide into blocks, an ``exclude`` that names
            nothing, a base that trains, codes of another form. Nothing has been changed then.
        ValueError: a model that is wrapped or quantised already, or into which something else than ``codes_of`` was
            loaded.
    """
    chunks, quant = chunks_of(model), quant or BaseQuant()
    plan, codes = planned(chunks, quant, built_packed=False), codes_in(codes_of, quant)
    for one in plan.matrices:
        one.pack()
    return compress(chunks, plan, quant, codes)


def codes_in(directory: str | os.PathLike | None, quant: BaseQuant) -> BaseCheckpoint | None:
    """The checkpoint in a directory, if it holds codes. Collective; raises as ``check_codes``."""
    base = None if directory is None else everywhere(lambda: BaseCheckpoint(directory))
    if base is None or not base.coded:
        return None
    everywhere(lambda: check_codes(quant, base))
    return base


def base_quant_of(model: Any) -> BaseQuant | None:
    """What the base of a model is stored as; None: dense."""
    return next((getattr(unwrapped(chunk), "lora_base_quant", None) for chunk in chunks_of(model)), None)


@dataclass(frozen=True)
class Matrix:
    """One base weight that is, or is to be, packed."""

    name: str
    """Global Megatron name of its linear; of the stacked linear of experts."""
    base: FrozenLinear
    attribute: str
    """Name of the parameter in its module."""
    expert: int | None = None
    """Number, in the whole layer, of the expert that it is of."""

    @property
    def parameter(self) -> Any:
        return self.base.module._parameters[self.attribute]

    def pack(self) -> None:
        """Put the codes of the dense weight in its place, scales not nested."""
        dense = self.parameter
        packed = torch.nn.Parameter(PackedWeight(Packed.of(dense.detach()), dense.dtype), requires_grad=False)
        packed.__dict__.update(dense.__dict__)
        self.base.module._parameters[self.attribute] = packed

    @property
    def parts(self) -> tuple[Part, ...]:
        """Its projections, as rows of this shard."""
        record = record_of(self.name)
        return ROWS[record.rows](self.name, record.leaves, self.base.shape[0], self.base.config, self.base.shards)

    @property
    def hf_names(self) -> tuple[str, ...]:
        """Of ``parts``, canonical."""
        return hf_names(self.name if self.expert is None else of_expert(self.name, self.expert))


@dataclass(frozen=True)
class Plan:
    """What of this rank's model is packed."""

    matrices: tuple[Matrix, ...]
    excluded: tuple[str, ...]


def planned(chunks: Sequence[torch.nn.Module], quant: BaseQuant, *, built_packed: bool) -> Plan:
    """Which matrices are to be packed. Collective over the world: what one rank refuses, all raise.

    Args:
        built_packed: they are unset codes already (``packing``).
    """
    targets = quant.targets
    candidates = [one for chunk in chunks for one in matrices_of(chunk)]

    def select() -> Plan:
        nf4.bitsandbytes()
        for chunk in chunks:
            if hasattr(chunk, "ddp_config"):
                raise ValueError("quantize_base was given a model that DDP has wrapped already; quantise it before")
        adapted = has_adapters(chunks)
        out = {one.name for one in candidates if is_excluded(targets, one.name)}
        chosen = tuple(one for one in candidates if one.name not in out)
        for one in chosen:
            _check(one, adapted, built_packed)
        return Plan(chosen, tuple(sorted(out)))

    plan, problem = attempt(select)
    for other in all_gather(problem):
        if other is not None:
            raise other
    assert plan is not None
    stages = all_gather_over(pipeline_group(), (sorted(targets.matched), [one.name for one in candidates]))
    matched = {entry for entries, _ in stages for entry in entries}
    check_all_matched(targets, matched, [name for _, names in stages for name in names])
    return plan


def matrices_of(chunk: torch.nn.Module) -> Iterator[Matrix]:
    """Every base weight of the decoder linears that the name table knows, in model order."""
    modules = dict(chunk.named_modules())
    for path, module in modules.items():
        match = _LAYER.match(path)
        base = frozen_of(module) if match else None
        if match is None or base is None or not base.owns_weights:
            continue
        leaf = _EXPERT.sub("", match[3])
        if not is_known(leaf) or record_of(f"decoder.layers.0.{leaf}").by_name_only:
            continue
        layer: Any = modules[path[: match.end(2)]]
        experts = _experts(path, base, modules)
        for index, parameter in enumerate(base.parameters):
            attribute = next(name for name, one in module._parameters.items() if one is parameter)
            name = f"{match[1]}{layer.layer_number - 1}.{leaf}"
            yield Matrix(name, base, attribute, None if experts is None else experts[index])


def _experts(path: str, base: FrozenLinear, modules: dict[str, Any]) -> Sequence[int] | None:
    """Numbers of the experts whose matrices a linear holds, in the whole layer; None: it is not of routed experts."""
    parent, found, own = path.partition(".local_experts.")
    if not found:
        return base.experts
    experts = modules[parent]
    return [experts.ep_group.rank() * experts.num_local_experts + int(own.partition(".")[0])]


def _check(one: Matrix, adapted: bool, built_packed: bool) -> None:
    if isinstance(one.parameter, PackedWeight) and not built_packed:
        raise ValueError(f"{one.name} is in 4 bits already; quantize_base once per model")
    if one.parameter.dim() != 2:
        raise ValueError(
            f"{one.name} holds all its experts in one parameter of TransformerEngine, which is not packed; "
            "build it with a weight per expert, or exclude the experts"
        )
    if one.parameter.requires_grad and adapted:
        raise UsageError(
            f"{one.name} trains (--no-lora-only-trainable): 4-bit weights are frozen; train adapters alone"
        )
    check_blocks(one.name, one.base.shape[1], one.base.shards if one.base.parallel == "row" else 1)
    if one.parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UsageError(f"{one.name} is {one.parameter.dtype}; 4-bit codes are made of float32 or 16-bit weights")
    _ = one.parts  # raises for a shard that cannot be taken apart


def compress(
    chunks: Sequence[torch.nn.Module], plan: Plan, quant: BaseQuant, codes: BaseCheckpoint | None = None
) -> QuantReport:
    """End of loading: nest the scales of every packed matrix, or take codes as they are, and let the linears run.

    Collective. Raises ValueError where the codes are not those of what was loaded.
    """
    linears: dict[int, tuple[torch.nn.Module, list[str]]] = {}
    if codes is not None:
        everywhere(lambda: _take_codes(plan.matrices, codes, quant))
    for one in plan.matrices:
        if codes is None:
            packed = one.parameter.packed
            packed.seal(_nested(packed.absmax, one.base, one.parts) if quant.double_quant else None)
        linears.setdefault(id(one.base.module), (one.base.module, []))[1].append(one.attribute)
    for module, names in linears.values():
        hold(module, names)
    for chunk in chunks:
        unwrapped(chunk).lora_base_quant = quant  # type: ignore[assignment]
    packed = [one.parameter for one in plan.matrices]
    return QuantReport(
        len(packed),
        sum(parameter.numel() for parameter in packed),
        sum(parameter.packed.nbytes for parameter in packed),
        sum(parameter.nbytes for parameter in packed),
        plan.excluded,
    )


def _take_codes(matrices: Sequence[Matrix], checkpoint: BaseCheckpoint, quant: BaseQuant) -> None:
    """As ``_take`` of every one."""
    for one in matrices:
        _take(one, checkpoint, quant)


def _take(one: Matrix, checkpoint: BaseCheckpoint, quant: BaseQuant) -> None:
    """Put a checkpoint's own codes in place of those that were made of its dequantised values.

    Raises:
        UsageError: a matrix that the checkpoint does not hold in codes of this form.
        ValueError: the values that were loaded are not those of the codes.
    """
    base, packed = one.base, one.parameter.packed
    rank, device = base.tp_group.rank() if base.shards > 1 else 0, packed.codes.device
    shape = packed.codes.shape[0], packed.codes.shape[1] * 2 // BLOCK
    absmax = torch.empty(shape, dtype=torch.uint8 if quant.double_quant else torch.float32, device=device)
    first = torch.empty(shape[0], dtype=torch.int32, device=device)
    groups, means, ends, start = [], [], [], 0
    for part, name in zip(one.parts, one.hf_names):
        weight = in_codes(checkpoint, name, short_name(one.name), quant)
        codes, scales = weight.stored()
        mine, whole = part.take(absmax), scales.absmax.view(weight.shape[0], -1)
        row, column = _corner(mine, base, rank)
        here, across = slice(row, row + mine.shape[0]), slice(column, column + mine.shape[1])
        part.put(absmax, whole[here, across].to(device))
        in_bytes = slice(across.start * BLOCK // 2, across.stop * BLOCK // 2)
        part.put(packed.codes, codes[here, in_bytes].to(device))
        rows = torch.arange(here.start, here.stop, dtype=torch.int32, device=device)
        part.put(first, rows * whole.shape[1] + column + start)
        start += math.ceil(whole.numel() / GROUP) * GROUP
        ends.append(start)
        if scales.groups is not None:
            groups.append(scales.groups.to(device))
            means.append(scales.mean)
    packed.rounded = torch_dtype(weight.dtype)
    if quant.double_quant:
        last = torch.tensor(ends, dtype=torch.int32, device=device)
        packed.seal(nf4.Scales(absmax, first, torch.cat(groups), torch.tensor(means, device=device), last))
    else:
        packed.absmax = absmax
        packed.seal(None)
    if not torch.equal(checksum(packed.dense(one.parameter.dtype)), packed.source):
        raise ValueError(
            f"{one.name}: what was loaded is not what the codes in {checkpoint.directory} stand for; load the model "
            "from that checkpoint"
        )


def _nested(absmax_ON: torch.Tensor, base: FrozenLinear, parts: tuple[Part, ...]) -> nf4.Scales:
    """Scales of one shard, nested with those of the whole projections. Collective over the tensor-parallel group."""
    rank = base.tp_group.rank() if base.shards > 1 else 0
    codes = torch.empty_like(absmax_ON, dtype=torch.uint8)
    first = torch.empty(absmax_ON.shape[0], dtype=torch.int32, device=absmax_ON.device)
    groups, means, ends, start = [], [], [], 0
    for part in parts:
        mine = part.take(absmax_ON)
        whole = _gathered(mine, base)
        coded, scales, mean = nf4.nest(whole.reshape(-1))
        row, column = _corner(mine, base, rank)
        part.put(codes, coded.view(whole.shape)[row : row + mine.shape[0], column : column + mine.shape[1]])
        rows = torch.arange(row, row + mine.shape[0], dtype=torch.int32)
        part.put(first, rows * whole.shape[1] + column + start)
        start += math.ceil(whole.numel() / GROUP) * GROUP
        groups.append(scales)
        means.append(mean)
        ends.append(start)
    if start >= 2**31:
        raise ValueError(f"a linear of {start * BLOCK:,} weights is too large for NF4's positions of 31 bits")
    last = torch.tensor(ends, dtype=torch.int32, device=absmax_ON.device)
    return nf4.Scales(codes, first, torch.cat(groups), torch.stack(means), last)


def _gathered(shard: torch.Tensor, base: FrozenLinear) -> torch.Tensor:
    if base.shards == 1:
        return shard
    shards = [torch.empty_like(shard) for _ in range(base.shards)]
    dist.all_gather(shards, shard.contiguous(), group=base.tp_group)
    return torch.cat(shards, dim=1 if base.parallel == "row" else 0)


def _corner(shard: torch.Tensor, base: FrozenLinear, rank: int) -> tuple[int, int]:
    """Row and column of a shard in the whole."""
    return (0, rank * shard.shape[1]) if base.parallel == "row" else (rank * shard.shape[0], 0)
