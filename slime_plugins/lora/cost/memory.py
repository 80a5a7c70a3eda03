"""Weights, gradients and optimizer of the fullest rank, and bytes per weight sync. Pure arithmetic.

Bytes per trainable parameter of Megatron's mixed precision with the distributed optimizer, D data-parallel ranks:

    weight 2 (bf16)   gradient 4 (fp32 buffer)   optimizer 12 / D (fp32 master, two moments)

A float32 weight is its own master: 4, 4 and 8 / D. A frozen parameter has its weight alone, dense or in
4 bits (``base.quantization``). Experts lie on EP x ETP ranks; D of theirs is what is left of TP x DP.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from slime_plugins.lora.base.quantization import BaseQuant, check_checkpoint, dense_modules
from slime_plugins.lora.config import LoRAConfig
from slime_plugins.lora.cost.model import BYTES, Model, Split, layer_of, shards_of
from slime_plugins.lora.names import LINEARS, Linear, hf_names, in_experts, megatron_name, record_of
from slime_plugins.lora.parameters import lora_parameters
from slime_plugins.lora.targets import Targets, check_all_matched

_GRADIENT = 4


@dataclasses.dataclass(frozen=True)
class RankCost:
    """GPU memory of one rank by part, in bytes, without activations."""

    base_weights: int
    adapter_weights: int
    """Of what is trained beside the base: adapters, rows of new tokens."""
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.base_weights + self.adapter_weights + self.gradients + self.optimizer


@dataclasses.dataclass(frozen=True)
class Cost:
    """One run with adapters, beside the same run with full training."""

    base_parameters: int
    adapter_parameters: int
    """Each replica counted once: the number that ``apply_lora`` reports."""
    lora: RankCost
    full: RankCost
    sync_merged: int
    """Bytes that one inference engine receives per weight sync, whole matrices in the base's dtype."""
    sync_adapter: int
    """The same with ``--lora-sync adapter``: the PEFT adapter, where q, k and v each carry their A."""
    checkpoint_lora: int
    """Weights, masters and moments."""
    checkpoint_full: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run trains, and what the frozen rest is stored as."""

    base: bool = False
    """The whole base."""
    lora: LoRAConfig | None = None
    quant: BaseQuant | None = None
    new_tokens: int = 0
    """Rows of the embedding, and of an untied head, that are trained beside a frozen base."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One linear's."""

    name: str
    """Megatron's, global."""
    record: Linear
    layer: int
    parameters: int
    """Of all experts, each replica once."""
    local: int
    """Elements on one rank."""
    width: int
    """Of h: rank x stacked As."""
    peft_per_rank: int
    """Elements of the exported tensors, per unit of rank."""
    rank: int


def cost_of(
    model: Model,
    config: LoRAConfig,
    split: Split | None = None,
    *,
    dtype: str = "bfloat16",
    freeze_base: bool = True,
    base_quant: BaseQuant | None = None,
) -> Cost:
    """Cost of training one model with adapters, and of training all of it.

    Args:
        split: must fit the model (``Model.check``; not checked here).
        dtype: of the base; the adapter's own is ``config.dtype`` if set.
        base_quant: what decoder linears are stored as; None: as ``dtype``. Not of full training.
    Raises:
        UsageError: a target that names nothing, a base that does not divide into blocks.
    """
    split = split or Split()
    adapters = list(adapters_of(model, config, split))
    trained = Trained(base=not freeze_base, lora=config, quant=base_quant)
    parameters = sum(a.parameters for a in adapters)
    widest = max((a.rank for a in adapters), default=0)  # the exported adapter has one rank
    return Cost(
        base_parameters=model.parameters,
        adapter_parameters=parameters,
        lora=fullest(stage_costs(model, trained, split, dtype)),
        full=fullest(stage_costs(model, Trained(base=True), split, dtype)),
        sync_merged=model.parameters * BYTES[dtype],
        sync_adapter=sum(a.peft_per_rank for a in adapters) * widest * BYTES[config.dtype or dtype],
        checkpoint_lora=parameters * _stored(config.dtype or dtype),
        checkpoint_full=model.parameters * _stored(dtype),
    )


def fullest(costs: list[RankCost]) -> RankCost:
    """The one that needs most."""
    return max(costs, key=lambda cost: cost.total)


def stage_costs(model: Model, trained: Trained, split: Split, dtype: str) -> list[RankCost]:
    """Of a rank of each pipeline stage. Raises as ``cost_of``."""
    adapters = list(adapters_of(model, trained.lora, split)) if trained.lora else []
    return [_stage_cost(model, trained, adapters, split, dtype, stage) for stage in range(split.pp)]


def _stage_cost(
    model: Model, trained: Trained, adapters: list[Adapter], split: Split, dtype: str, stage: int
) -> RankCost:
    dense, experts = _stage_elements(model, split, stage)
    saved = _saved(model, trained.quant, split, stage, BYTES[dtype])
    base_weights = (dense + experts) * BYTES[dtype] - saved
    own = (trained.lora and trained.lora.dtype) or dtype
    here = [a for a in adapters if model.stage_of(a.layer, split) == stage]
    beside = [_training(sum(a.local for a in here if not a.record.is_expert), own, split.dp)]
    beside += [_training(sum(a.local for a in here if a.record.is_expert), own, split.expert_dp)]
    beside += [_training(_rows(model, trained.new_tokens, split, stage), dtype, split.dp)]
    base = [_training(dense, dtype, split.dp), _training(experts, dtype, split.expert_dp)] if trained.base else []
    return RankCost(
        base_weights,
        sum(cost.adapter_weights for cost in beside),
        sum(cost.gradients for cost in (*beside, *base)),
        sum(cost.optimizer for cost in (*beside, *base)),
    )


def adapters_of(model: Model, config: LoRAConfig, split: Split) -> Iterator[Adapter]:
    """Every adapted linear. Raises UsageError for a target that names nothing."""
    targets, names = Targets(config.target_modules, config.exclude_modules), []
    found = []
    for layer in range(model.num_layers):
        for path, record in LINEARS.items():
            name = f"decoder.layers.{layer}.{path}"
            if record.mla not in (None, model.mla) or f"{hf_names(name)[0]}.weight" not in model.shapes:
                continue
            names.append(name)
            projections = [hf_names(name)[part] for part in targets.parts_of(name)]
            if projections:
                found.append(_adapter(layer, name, projections, model, config, split))
    check_all_matched(targets, targets.matched, names)
    yield from found


def _adapter(layer: int, name: str, projections: list[str], model: Model, config: LoRAConfig, split: Split) -> Adapter:
    rank = max(config.rank_of(name, projection) for projection in projections)
    shapes = [model.shapes[f"{projection}.weight"] for projection in projections]
    outs, ins = zip(*(shape[-2:] for shape in shapes))
    record = record_of(name)
    experts = shapes[0][0] if record.is_expert else 1
    shards = split.experts_tp if record.is_expert else split.tp
    stacked = len(projections) if config.layout == "split" else 1
    table = lora_parameters(
        record.parallel,
        rows=sum(outs) // (shards if record.parallel == "column" else 1),
        columns=ins[0] // (shards if record.parallel == "row" else 1),
        rank=rank,
        stacked=stacked,
    )
    full, local = sum(entry.full_numel(shards) for entry in table), sum(entry.numel for entry in table)
    here = experts // (split.ep if record.is_expert else 1)
    peft = (sum(outs) + sum(ins)) * experts
    return Adapter(name, record, layer, full * experts, local * here, rank * stacked, peft, rank)


def _stage_elements(model: Model, split: Split, stage: int) -> tuple[int, int]:
    """Base parameters on one rank of one pipeline stage: dense ones, and those of routed experts."""
    dense = experts = 0
    for name, shape in model.shapes.items():
        layer, size = layer_of(name), math.prod(shape)
        if layer is not None:
            if model.stage_of(layer, split) == stage:
                local = size // shards_of(name, shape, model, split)
                dense, experts = (dense, experts + local) if in_experts(name) else (dense + local, experts)
        elif name == "model.norm.weight":
            dense += size if stage == split.pp - 1 else 0
        else:
            last = name == "lm_head.weight" or (model.tied and split.pp > 1)
            dense += vocabulary_rows(model, split) * shape[1] * _ends(split, stage, name != "lm_head.weight", last)
    return dense, experts


def vocabulary_rows(model: Model, split: Split) -> int:
    """Of the embedding or the head, on one rank."""
    return math.ceil(model.vocab_size / split.tp)


def _ends(split: Split, stage: int, first: bool, last: bool) -> int:
    """How many matrices of the vocabulary a stage holds, of one that lies on the first, the last, or both.

    A tied head is a copy on a last stage of its own.
    """
    return (stage == 0) * first + (stage == split.pp - 1) * last


def _rows(model: Model, new_tokens: int, split: Split, stage: int) -> int:
    """Elements of trained rows on a rank of a stage. Each tensor-parallel rank holds them all."""
    matrices = _ends(split, stage, True, not model.tied or split.pp > 1)
    return new_tokens * model.hidden * matrices


def _saved(model: Model, quant: BaseQuant | None, split: Split, stage: int, element: int) -> int:
    """Bytes that a rank of a stage does not need because decoder linears are stored as codes."""
    if quant is None:
        return 0
    linears = model.linears()
    check_checkpoint(quant, linears, tp=split.tp, etp=split.experts_tp, mla=model.mla)
    dense, saved = set(dense_modules(quant, linears, mla=model.mla)), 0
    for name, shape in linears.items():
        layer = layer_of(name)
        if layer is None or model.stage_of(layer, split) != stage or name in dense:
            continue
        cut = record_of(megatron_name(name, mla=model.mla)[0]).parallel
        shards = split.experts_tp if in_experts(name) else split.tp if cut != "duplicated" else 1
        here = shape[0] // split.ep if in_experts(name) else 1
        matrix = (shape[-2], shape[-1])
        saved += here * (math.prod(matrix) // shards * element - quant.bytes_of(matrix, shards=shards, cut=cut))
    return saved


def _training(elements: int, dtype: str, ranks: int) -> RankCost:
    return RankCost(
        base_weights=0,
        adapter_weights=elements * BYTES[dtype],
        gradients=elements * _GRADIENT,
        optimizer=elements * (_stored(dtype) - BYTES[dtype]) // ranks,
    )


def _stored(dtype: str) -> int:
    """Bytes per trained parameter: its weight, a float32 master where it is not one itself, two moments."""
    return 12 if dtype == "float32" else BYTES[dtype] + 12
