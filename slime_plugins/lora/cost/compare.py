"""Ways to train a model beside each other: memory of the fullest rank by part, and which recompute a GPU allows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from slime_plugins.lora.base.quantization import BaseQuant
from slime_plugins.lora.config import LoRAConfig
from slime_plugins.lora.cost.activations import RECOMPUTE, Batch, Kernels, stage_activations
from slime_plugins.lora.cost.memory import RankCost, Trained, adapters_of, stage_costs
from slime_plugins.lora.cost.model import Model, Split
from slime_plugins.lora.errors import UsageError

RANKS = (8, 16, 32)
"""Of the adapters that are compared."""


@dataclass(frozen=True)
class Peak:
    """The fullest rank under one kind of recompute, in bytes."""

    weights: RankCost
    activations: int
    """Kept from forward to backward, of all microbatches in flight."""
    work: int
    """Logits and loss, or one layer in backward, whichever is more."""

    @property
    def total(self) -> int:
        return self.weights.total + self.activations + self.work


@dataclass(frozen=True)
class Method:
    """One way to train one model."""

    name: str
    trained_parameters: int
    peaks: dict[str, Peak]
    """Kind of recompute -> fullest rank; empty if it cannot be, for the reason ``refused``."""
    refused: str = ""

    def least_recompute(self, gpu_bytes: int) -> str | None:
        """The first of ``RECOMPUTE`` that fits; None where none does."""
        return next((kind for kind in RECOMPUTE if self.peaks and self.peaks[kind].total <= gpu_bytes), None)


@dataclass(frozen=True)
class Comparison:
    """One model."""

    model: Model
    methods: list[Method]


def compare(
    model: Model,
    config: LoRAConfig,
    split: Split,
    batch: Batch,
    *,
    new_tokens: int,
    quant: BaseQuant | None = None,
    dtype: str = "bfloat16",
    kernels: Kernels | None = None,
) -> Comparison:
    """Every method of one model.

    Args:
        split: what of it cuts experts is left out for a model that has none.
        config: of the adapters; the rank is that of each method, ``config.rank`` one more where it is not in RANKS.
        quant: of the 4-bit base; None: nested nf4 everywhere.
        new_tokens: rows that are trained with the model frozen.
    Raises:
        UsageError: a model that does not split this way, a target that names nothing.
    """
    split = model.without_experts(split)
    model.check(split)
    ranks = sorted({*RANKS, config.rank})
    methods = {"full": Trained(base=True)}
    methods |= {f"LoRA r={rank}": Trained(lora=dataclasses.replace(config, rank=rank)) for rank in ranks}
    small = dataclasses.replace(config, rank=ranks[0])
    methods[f"QLoRA r={ranks[0]}"] = Trained(lora=small, quant=quant or BaseQuant())
    methods[f"{new_tokens:,} new tokens"] = Trained(new_tokens=new_tokens)
    return Comparison(
        model, [_method(name, model, trained, split, batch, dtype, kernels) for name, trained in methods.items()]
    )


def _method(
    name: str, model: Model, trained: Trained, split: Split, batch: Batch, dtype: str, kernels: Kernels | None
) -> Method:
    parameters = model.parameters if trained.base else 0
    parameters += sum(a.parameters for a in adapters_of(model, trained.lora, split)) if trained.lora else 0
    parameters += trained.new_tokens * model.hidden * (1 if model.tied else 2)
    try:
        static = stage_costs(model, trained, split, dtype)
    except UsageError as error:
        if trained.quant is None:
            raise
        return Method(name, parameters, {}, str(error))
    peaks = {}
    for kind in RECOMPUTE:
        stages = stage_activations(model, trained, split, batch, recompute=kind, dtype=dtype, kernels=kernels)
        found = [Peak(cost, stage.kept * stage.in_flight, stage.work) for cost, stage in zip(static, stages)]
        peaks[kind] = max(found, key=lambda peak: peak.total)
    return Method(name, parameters, peaks)


def as_json(comparison: Comparison, gpu_bytes: int) -> dict[str, Any]:
    """Bytes and counts, ready for JSON. ``recompute``: the least that fits ``gpu_bytes``, null if none does."""
    methods = []
    for method in comparison.methods:
        entry: dict[str, Any] = {"name": method.name, "trained_parameters": method.trained_parameters}
        entry["recompute"] = method.least_recompute(gpu_bytes)
        entry["peaks"] = {
            kind: {
                **dataclasses.asdict(peak.weights),
                "activations": peak.activations,
                "work": peak.work,
                "total": peak.total,
            }
            for kind, peak in method.peaks.items()
        }
        if method.refused:
            entry["refused"] = method.refused
        methods.append(entry)
    model = comparison.model
    return {
        "model": model.name,
        "architecture": model.architecture,
        "parameters": model.parameters,
        "methods": methods,
    }
