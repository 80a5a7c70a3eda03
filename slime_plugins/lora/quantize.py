"""Store the base of a model as 4-bit codes: which linears, and the collective that gives them nested scales.

The bits are those of one process that quantises the whole checkpoint: codes and scales of a shard are slices of the
full matrix's, and nested scales are computed on all scales of one Hugging Face projection, gathered.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from slime_plugins.lora.adapters import has_adapters
from slime_plugins.lora.base.quantization import BLOCK, GROUP, BaseQuant, check_blocks, is_excluded
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.layers import FrozenLinear, frozen_of
from slime_plugins.lora.layout import ROWS, Part
from slime_plugins.lora.names import IN_LAYER, is_known, record_of
from slime_plugins.lora.parallel import all_gather, all_gather_over, attempt, chunks_of, pipeline_group, unwrapped
from slime_plugins.lora.quant import nf4
from slime_plugins.lora.quant.hold import hold
from slime_plugins.lora.quant.packed import Packed, PackedWeight
from slime_plugins.lora.targets import check_all_matched

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


def quantize_base(model: Any, quant: BaseQuant | None = None) -> QuantReport:
    """Store every decoder linear of a loaded model as NF4 codes, in place. Before or after ``apply_lora``, before DDP.

    Names and shapes of parameters stay; what multiplies from then on is the dequantised weight, the same bits at every
    parallelism and in transformers + bitsandbytes. Embeddings, output layer, norms, biases, routers and multi-token
    prediction stay as they are.

    Args:
        model: a Megatron module, or the list of this rank's pipeline chunks, its weights loaded, in the dtype in which
            it trains.
        quant: the form; NF4 with nested scales by default.
    Collectives:
        objects over the world and the pipeline group; per matrix an all_gather over its tensor-parallel group.
    Raises:
        UsageError: bitsandbytes is missing, a linear that does not divide into blocks, an ``exclude`` that names
            nothing, a base that trains. Nothing has been changed then.
        ValueError: a model that is wrapped or quantised already.
    """
    chunks, quant = chunks_of(model), quant or BaseQuant()
    plan = planned(chunks, quant, built_packed=False)
    for one in plan.matrices:
        one.pack()
    return compress(chunks, plan, quant)


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
        match = IN_LAYER.match(path)
        base = frozen_of(module) if match and match[3] else None
        if match is None or base is None or not base.owns_weights or not base.can_be_packed:
            continue
        leaf = _EXPERT.sub("", match[3])
        if not is_known(leaf) or record_of(f"decoder.layers.0.{leaf}").by_name_only:
            continue
        layer: Any = modules[path[: match.end(2)]]
        for parameter in base.parameters:
            attribute = next(name for name, one in module._parameters.items() if one is parameter)
            yield Matrix(f"{match[1]}{layer.layer_number - 1}.{leaf}", base, attribute)


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


def compress(chunks: Sequence[torch.nn.Module], plan: Plan, quant: BaseQuant) -> QuantReport:
    """End of loading: nest the scales of every packed matrix, and let the linears run. Collective."""
    linears: dict[int, tuple[torch.nn.Module, list[str]]] = {}
    for one in plan.matrices:
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
