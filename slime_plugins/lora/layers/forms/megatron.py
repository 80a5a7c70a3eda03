"""LoRA forms of Megatron-Core's own (local) linears, and the registry of all forms."""

from __future__ import annotations

import sys

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

from slime_plugins.lora.layers.adapter import LoRALinear
from slime_plugins.lora.layers.forms import experts, router


class LoRAColumnParallelLinear(LoRALinear, ColumnParallelLinear):
    """Rows of W and B sharded, A replicated."""


class LoRARowParallelLinear(LoRALinear, RowParallelLinear):
    """Columns of W and A sharded, B replicated."""


# Exact class -> its LoRA form and parallel mode.
LORA_CLASSES = {
    ColumnParallelLinear: (LoRAColumnParallelLinear, "column"),
    RowParallelLinear: (LoRARowParallelLinear, "row"),
    **experts.LORA_CLASSES,
    **router.LORA_CLASSES,
}


def adapted_class(linear: torch.nn.Module) -> tuple[type, str] | None:
    """The LoRA class for this linear's exact class, and its parallel mode; None if there is none.

    TransformerEngine is never imported from here: a model that has its linears has loaded Megatron's module for them.
    """
    extension = sys.modules.get("megatron.core.extensions.transformer_engine")
    if not getattr(extension, "HAVE_TE", False):
        return LORA_CLASSES.get(type(linear))
    from slime_plugins.lora.layers.forms import te

    return (LORA_CLASSES | te.LORA_CLASSES).get(type(linear))


def weight_shards(module: torch.nn.Module, tp_size: int) -> int:
    """Into how many shards the weights of a module are cut, adapted or not, of which this rank holds one.

    The marks on the parameters alone do not tell: TE sets them on duplicated weights too, and Megatron's own linears
    only when they initialise the weight.
    """
    if isinstance(module, LoRALinear):
        parallel = module.lora.parallel
    elif isinstance(module, VocabParallelEmbedding):
        parallel = "column"
    else:
        _, parallel = adapted_class(module) or (None, None)
    if parallel is None:
        marked = any(getattr(p, "tensor_model_parallel", False) for p in module.parameters(recurse=False))
        return tp_size if marked else 1
    return 1 if parallel == "duplicated" else tp_size
