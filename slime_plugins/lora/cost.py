"""What an adapter will cost, from sizes alone: parameters, bytes on a rank, bytes per weight sync. Pure arithmetic.

Bytes per trainable parameter of Megatron's mixed precision with the distributed optimizer, D data-parallel ranks:

    weight 2 (bf16)   gradient 4 (fp32 buffer)   optimizer 12 / D (fp32 master, two moments)

A float32 weight is its own master: 4, 4 and 8 / D. A frozen parameter has its weight alone, dense or in
4 bits (``base.quantization``). Without activations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

from slime_plugins.lora.base.quantization import BaseQuant, check_checkpoint, dense_modules
from slime_plugins.lora.config import LoRAConfig
from slime_plugins.lora.names import LINEARS, hf_names, megatron_name, record_of
from slime_plugins.lora.parameters import lora_parameters
from slime_plugins.lora.targets import Targets, check_all_matched

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_GRADIENT = 4


@dataclasses.dataclass(frozen=True)
class RankCost:
    """GPU memory of the fullest rank by part, in bytes, without activations."""

    base_weights: int
    adapter_weights: int
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


@dataclasses.dataclass(frozen=True)
class _Adapter:
    layer: int
    parameters: int
    local: int
    """Elements on one tensor-parallel rank."""
    peft_per_rank: int
    """Elements of the exported tensors, per unit of rank."""
    rank: int


def cost_of(
    shapes: Mapping[str, tuple[int, ...]],
    config: LoRAConfig,
    *,
    num_layers: int,
    tied: bool,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    dtype: str = "bfloat16",
    freeze_base: bool = True,
    base_quant: BaseQuant | None = None,
) -> Cost:
    """Cost of training one dense model.

    Args:
        shapes: Hugging Face name -> shape of every tensor of the base; tied heads once.
        tp, pp, dp: must split the model evenly (not checked here).
        dtype: of the base; the adapter's own is ``config.dtype`` if set.
        base_quant: what decoder linears are stored as; None: as ``dtype``. Not of full training.
    Raises:
        UsageError: a target that names nothing, a base that does not divide into blocks.
    """
    adapters = list(_adapters(shapes, config, num_layers, tp))
    adapter_dtype = config.dtype or dtype
    stages = [_stage_elements(shapes, num_layers, tied, tp, pp, stage) for stage in range(pp)]
    locals_ = [sum(a.local for a in adapters if a.layer * pp // num_layers == stage) for stage in range(pp)]
    saved = [_saved(shapes, base_quant, num_layers, tp, pp, stage, BYTES[dtype]) for stage in range(pp)]
    nothing = RankCost(0, 0, 0, 0)
    trained_base = [nothing if freeze_base else _training(base, dtype, dp) for base in stages]
    trained_adapter = [_training(local, adapter_dtype, dp) for local in locals_]
    lora = [
        RankCost(base * BYTES[dtype] - less, a.adapter_weights, a.gradients + b.gradients, a.optimizer + b.optimizer)
        for base, less, a, b in zip(stages, saved, trained_adapter, trained_base)
    ]
    full = [dataclasses.replace(_training(base, dtype, dp), base_weights=base * BYTES[dtype]) for base in stages]
    full = [dataclasses.replace(cost, adapter_weights=0) for cost in full]
    parameters = sum(a.parameters for a in adapters)
    base_parameters = sum(math.prod(shape) for shape in shapes.values())
    widest = max((a.rank for a in adapters), default=0)  # the exported adapter has one rank
    return Cost(
        base_parameters=base_parameters,
        adapter_parameters=parameters,
        lora=max(lora, key=lambda cost: cost.total),
        full=max(full, key=lambda cost: cost.total),
        sync_merged=base_parameters * BYTES[dtype],
        sync_adapter=sum(a.peft_per_rank for a in adapters) * widest * BYTES[adapter_dtype],
        checkpoint_lora=parameters * _stored(adapter_dtype),
        checkpoint_full=base_parameters * _stored(dtype),
    )


def _adapters(shapes: Mapping, config: LoRAConfig, num_layers: int, tp: int) -> Iterator[_Adapter]:
    targets, names = Targets(config.target_modules, config.exclude_modules), []
    found = []
    for layer in range(num_layers):
        for path, record in LINEARS.items():
            name = f"decoder.layers.{layer}.{path}"
            if record.mla or f"{hf_names(name)[0]}.weight" not in shapes:
                continue
            names.append(name)
            projections = [hf_names(name)[part] for part in targets.parts_of(name)]
            if projections:
                found.append(_adapter(layer, name, projections, shapes, config, tp))
    check_all_matched(targets, targets.matched, names)
    yield from found


def _adapter(layer: int, name: str, projections: list[str], shapes: Mapping, config: LoRAConfig, tp: int) -> _Adapter:
    rank = max(config.rank_of(name, projection) for projection in projections)
    outs, ins = zip(*(shapes[f"{projection}.weight"] for projection in projections))
    parallel = record_of(name).parallel
    table = lora_parameters(
        parallel,
        rows=sum(outs) // (tp if parallel == "column" else 1),
        columns=ins[0] // (tp if parallel == "row" else 1),
        rank=rank,
        stacked=len(projections) if config.layout == "split" else 1,
    )
    full, local = sum(entry.full_numel(tp) for entry in table), sum(entry.numel for entry in table)
    return _Adapter(layer, full, local, sum(outs) + sum(ins), rank)


def _stage_elements(shapes: Mapping, num_layers: int, tied: bool, tp: int, pp: int, stage: int) -> int:
    """Base parameters on one tensor-parallel rank of one pipeline stage."""
    elements = 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        if name.startswith("model.layers."):
            if int(name.split(".")[2]) * pp // num_layers == stage:
                # Norms are on every rank; matrices and the biases of q, k, v are cut.
                elements += size // tp if "_proj." in name else size
        elif name == "model.norm.weight":
            elements += size if stage == pp - 1 else 0
        else:
            rows = math.ceil(shape[0] / tp) * shape[1]
            last = name == "lm_head.weight" or (tied and pp > 1)  # a tied head is a copy on a last stage of its own
            elements += rows * ((stage == 0) * (name != "lm_head.weight") + (stage == pp - 1) * last)
    return elements


def _saved(
    shapes: Mapping, quant: BaseQuant | None, num_layers: int, tp: int, pp: int, stage: int, element: int
) -> int:
    """Bytes that a rank of a stage does not need because decoder linears are stored as codes."""
    if quant is None:
        return 0
    matrices = {
        n.removesuffix(".weight"): s for n, s in shapes.items() if n.startswith("model.layers.") and len(s) == 2
    }
    check_checkpoint(quant, matrices, tp=tp)
    dense, saved = set(dense_modules(quant, matrices)), 0
    for name, shape in matrices.items():
        if int(name.split(".")[2]) * pp // num_layers == stage and name not in dense:
            cut = record_of(megatron_name(name)[0]).parallel
            saved += math.prod(shape) // tp * element - quant.bytes_of(shape, shards=tp, cut=cut)
    return saved


def _training(elements: int, dtype: str, dp: int) -> RankCost:
    return RankCost(
        base_weights=0,
        adapter_weights=elements * BYTES[dtype],
        gradients=elements * _GRADIENT,
        optimizer=elements * (_stored(dtype) - BYTES[dtype]) // dp,
    )


def _stored(dtype: str) -> int:
    """Bytes per trained parameter: its weight, a float32 master where it is not one itself, two moments."""
    return 12 if dtype == "float32" else BYTES[dtype] + 12
