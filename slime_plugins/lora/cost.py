"""What an adapter will cost, from sizes alone: parameters, bytes on a rank, bytes per weight sync. Pure arithmetic.

Bytes per trainable parameter of Megatron's mixed precision with the distributed optimizer, D data-parallel ranks:

    weight 2 (bf16)   gradient 4 (fp32 buffer)   optimizer 12 / D (fp32 master, two moments)

A float32 weight is its own master: 4, 4 and 8 / D. A frozen parameter has its weight alone, dense or in
4 bits (``base.quantization``). Without activations.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping

from slime_plugins.lora.base.quantization import BaseQuant, check_checkpoint, dense_modules
from slime_plugins.lora.config import LoRAConfig
from slime_plugins.lora.names import LINEARS, hf_names, in_experts, megatron_name, record_of
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """Over how many ranks what is cut."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    """Expert-parallel ranks, of the tensor- and data-parallel ones."""
    etp: int | None = None
    """Expert-tensor-parallel ranks; None: as many as ``tp``, as Megatron has it."""

    def tensor(self, *, expert: bool) -> int:
        """Ranks over which one matrix is cut."""
        return self.tp if not expert or self.etp is None else self.etp

    def data(self, *, expert: bool) -> int:
        """Ranks over which the optimizer's state of one parameter is cut."""
        return self.tp * self.dp // (self.tensor(expert=True) * self.ep) if expert else self.dp


@dataclasses.dataclass(frozen=True)
class _Adapter:
    layer: int
    expert: bool
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
    split: Split | None = None,
    dtype: str = "bfloat16",
    freeze_base: bool = True,
    base_quant: BaseQuant | None = None,
) -> Cost:
    """Cost of training one model.

    Args:
        shapes: Hugging Face name -> shape of every tensor of the base; tied heads once, routed experts stacked.
        split: must split the model evenly (not checked here).
        dtype: of the base; the adapter's own is ``config.dtype`` if set.
        base_quant: what decoder linears are stored as; None: as ``dtype``. Not of full training.
    Raises:
        UsageError: a target that names nothing, a base that does not divide into blocks.
    """
    split = split or Split()
    adapters = list(_adapters(shapes, config, num_layers, split))
    adapter_dtype = config.dtype or dtype
    lora, full = [], []
    for stage in range(split.pp):
        base = {expert: _base_elements(shapes, num_layers, tied, split, stage, expert) for expert in (False, True)}
        local = {
            expert: sum(a.local for a in adapters if a.expert == expert and a.layer * split.pp // num_layers == stage)
            for expert in (False, True)
        }
        trained = _training(base, dtype, split)
        added, changed = _training(local, adapter_dtype, split), RankCost(0, 0, 0, 0) if freeze_base else trained
        stored = sum(base.values()) * BYTES[dtype] - _saved(shapes, base_quant, num_layers, split, stage, BYTES[dtype])
        gradients, optimizer = added.gradients + changed.gradients, added.optimizer + changed.optimizer
        lora.append(RankCost(stored, added.adapter_weights, gradients, optimizer))
        full.append(RankCost(sum(base.values()) * BYTES[dtype], 0, trained.gradients, trained.optimizer))
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


def _adapters(shapes: Mapping, config: LoRAConfig, num_layers: int, split: Split) -> Iterator[_Adapter]:
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
                found.append(_adapter(layer, name, projections, shapes, config, split))
    check_all_matched(targets, targets.matched, names)
    yield from found


def _adapter(
    layer: int, name: str, projections: list[str], shapes: Mapping, config: LoRAConfig, split: Split
) -> _Adapter:
    rank = max(config.rank_of(name, projection) for projection in projections)
    outs, ins = zip(*(shapes[f"{projection}.weight"][-2:] for projection in projections))
    record = record_of(name)
    parallel, expert = record.parallel, record.is_expert
    experts, tp = shapes[f"{projections[0]}.weight"][0] if expert else 1, split.tensor(expert=expert)
    table = lora_parameters(
        parallel,
        rows=sum(outs) // (tp if parallel == "column" else 1),
        columns=ins[0] // (tp if parallel == "row" else 1),
        rank=rank,
        stacked=len(projections) if config.layout == "split" else 1,
    )
    full, local = sum(entry.full_numel(tp) for entry in table), sum(entry.numel for entry in table)
    here = experts // split.ep if expert else 1
    return _Adapter(layer, expert, full * experts, local * here, (sum(outs) + sum(ins)) * experts, rank)


def _base_elements(shapes: Mapping, num_layers: int, tied: bool, split: Split, stage: int, expert: bool) -> int:
    """Base parameters on one rank of one pipeline stage: of routed experts, or all others."""
    elements, pp = 0, split.pp
    for name, shape in shapes.items():
        size = math.prod(shape)
        if in_experts(name) != expert:
            continue
        if name.startswith("model.layers."):
            if int(name.split(".")[2]) * pp // num_layers == stage:
                # Norms and routers are on every rank; matrices and the biases of q, k, v are cut.
                cut = split.tensor(expert=expert) * (split.ep if expert else 1)
                elements += size // cut if "_proj." in name else size
        elif name == "model.norm.weight":
            elements += size if stage == pp - 1 else 0
        else:
            rows = math.ceil(shape[0] / split.tp) * shape[1]
            last = name == "lm_head.weight" or (tied and pp > 1)  # a tied head is a copy on a last stage of its own
            elements += rows * ((stage == 0) * (name != "lm_head.weight") + (stage == pp - 1) * last)
    return elements


def _saved(shapes: Mapping, quant: BaseQuant | None, num_layers: int, split: Split, stage: int, element: int) -> int:
    """Bytes that a rank of a stage does not need because decoder linears are stored as codes."""
    if quant is None:
        return 0
    matrices = {
        n.removesuffix(".weight"): s for n, s in shapes.items() if n.startswith("model.layers.") and len(s) > 1
    }
    packed = {name: shape for name, shape in matrices.items() if not record_of(megatron_name(name)[0]).by_name_only}
    for expert in (False, True):
        part = {name: shape[-2:] for name, shape in packed.items() if in_experts(name) == expert}
        check_checkpoint(quant, part, tp=split.tensor(expert=expert))
    dense, saved = set(dense_modules(quant, packed)), 0
    for name, shape in packed.items():
        if int(name.split(".")[2]) * split.pp // num_layers == stage and name not in dense:
            record = record_of(megatron_name(name)[0])
            tp = split.tensor(expert=record.is_expert)
            one = math.prod(shape[-2:]) // tp * element - quant.bytes_of(shape[-2:], shards=tp, cut=record.parallel)
            saved += one * (shape[0] // split.ep if record.is_expert else 1)
    return saved


def activations_of(
    shapes: Mapping[str, tuple[int, ...]], *, tokens: int, num_layers: int, split: Split, per_token: int, dtype: str
) -> int:
    """An estimate of the bytes that a rank's activations take with full recompute, in a step of ``tokens``.

    The input of every layer (cut over tensor-parallel ranks: sequence parallelism is taken to be on with them); of one
    layer, which is computed again, what goes in and out of every linear; logits in the model's dtype, their float32
    copy, its softmax and its gradient.

    Args:
        per_token: routed experts that a token goes to.
    """
    hidden, vocab = shapes["model.embed_tokens.weight"][1], shapes["model.embed_tokens.weight"][0]
    layer = 0
    for name, shape in shapes.items():
        if name.startswith("model.layers.0.") and len(shape) > 1:
            times = per_token if in_experts(name) else 1
            layer += times * sum(shape[-2:])
    elements = hidden * num_layers / split.pp / split.tp + layer / split.tp
    return int(tokens * (elements * BYTES[dtype] + vocab / split.tp * (BYTES[dtype] + 3 * 4)))


def largest_dense(shapes: Mapping[str, tuple[int, ...]], split: Split, dtype: str) -> int:
    """Bytes of the largest linear of a rank, dense while it multiplies: Megatron's, of several projections."""
    sizes: dict[str, int] = defaultdict(int)
    for name, shape in shapes.items():
        if name.startswith("model.layers.0.") and len(shape) > 1:
            owner = megatron_name(name.removesuffix(".weight"))[0]
            expert = in_experts(name)
            sizes[owner] += math.prod(shape) // (split.tensor(expert=expert) * (split.ep if expert else 1))
    return max(sizes.values()) * BYTES[dtype]


def _training(elements: Mapping[bool, int], dtype: str, split: Split) -> RankCost:
    """Of trained parameters on a rank, those of routed experts (True) and all others."""
    states = {expert: count * (_stored(dtype) - BYTES[dtype]) for expert, count in elements.items()}
    return RankCost(
        base_weights=0,
        adapter_weights=sum(elements.values()) * BYTES[dtype],
        gradients=sum(elements.values()) * _GRADIENT,
        optimizer=sum(size // split.data(expert=expert) for expert, size in states.items()),
    )


def _stored(dtype: str) -> int:
    """Bytes per trained parameter: its weight, a float32 master where it is not one itself, two moments."""
    return 12 if dtype == "float32" else BYTES[dtype] + 12
