"""Which class of linear is which kind: how it is frozen, how it is adapted, how it is cut. One row per exact class."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.moe.router import TopKRouter

from slime_plugins.lora.layers.adapter import LoRALinear
from slime_plugins.lora.layers.forms.experts import (
    ExpertColumnLinears,
    ExpertRowLinears,
    LoRAExpertColumnLinears,
    LoRAExpertRowLinears,
)
from slime_plugins.lora.layers.forms.megatron import LoRAColumnParallelLinear, LoRARowParallelLinear, LoRATopKRouter
from slime_plugins.lora.layers.forms.plain import LoRAPlainLinear
from slime_plugins.lora.layers.forms.tokens import TokenRows
from slime_plugins.lora.layers.frozen import (
    FrozenExperts,
    FrozenLinear,
    FrozenPlainLinear,
    FrozenRouter,
    FrozenTEGroupedLinear,
    FrozenTELinear,
)


@dataclass(frozen=True)
class Kind:
    """A row of the table."""

    form: type[LoRALinear]
    """Its LoRA form: a subclass of the class, with ``LoRALinear`` in front."""
    parallel: str
    """``column``, ``row``, or ``duplicated``."""
    frozen: type[FrozenLinear] = FrozenLinear


KINDS: dict[type, Kind] = {
    ColumnParallelLinear: Kind(LoRAColumnParallelLinear, "column"),
    RowParallelLinear: Kind(LoRARowParallelLinear, "row"),
    ExpertColumnLinears: Kind(LoRAExpertColumnLinears, "column", FrozenExperts),
    ExpertRowLinears: Kind(LoRAExpertRowLinears, "row", FrozenExperts),
    TopKRouter: Kind(LoRATopKRouter, "duplicated", FrozenRouter),
    torch.nn.Linear: Kind(LoRAPlainLinear, "duplicated", FrozenPlainLinear),
}
"""Those of Megatron itself, and torch's in modules of Hugging Face's; see ``kind_of`` for TransformerEngine's."""


def kind_of(module: torch.nn.Module) -> Kind | None:
    """The kind of a linear that is not adapted; None for other modules.

    TransformerEngine is never imported from here: a model that has its linears has loaded Megatron's module for them.
    """
    kind = KINDS.get(type(module))
    extension = sys.modules.get("megatron.core.extensions.transformer_engine")
    if kind is not None or not getattr(extension, "HAVE_TE", False):
        return kind
    from slime_plugins.lora.layers.forms import te

    form, parallel = te.FORMS.get(type(module), (None, ""))
    if form is None:
        return None
    return Kind(form, parallel, FrozenTEGroupedLinear if "Grouped" in type(module).__name__ else FrozenTELinear)


def frozen_of(module: torch.nn.Module) -> FrozenLinear | None:
    """What a linear is, adapted or not; None for a module that is no linear of a known kind."""
    if isinstance(module, LoRALinear):
        return module.lora_base
    if isinstance(module, TokenRows):  # a tied output layer has no weight of its own
        own = module.lora_base.module is module
        return module.lora_base if own else FrozenLinear(module, "column", frozen_of)  # type: ignore[arg-type]
    kind = kind_of(module)
    return None if kind is None else kind.frozen(module, kind.parallel, frozen_of)  # type: ignore[arg-type]


def shards_of(module: torch.nn.Module, tp_size: int) -> int:
    """Into how many shards the weights of a module are cut, of which this rank holds one.

    The marks on the parameters alone do not tell: TE sets them on duplicated weights too, and Megatron's own linears
    only when they initialise the weight.
    """
    if isinstance(module, VocabParallelEmbedding):
        return tp_size
    base = frozen_of(module)
    if base is not None:
        return base.shards
    marked = any(getattr(p, "tensor_model_parallel", False) for p in module.parameters(recurse=False))
    return tp_size if marked else 1
