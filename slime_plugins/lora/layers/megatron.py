"""LoRA forms of Megatron-Core's own (local) linears."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from slime_plugins.lora.layers.adapter import LoRALinear


class LoRAColumnParallelLinear(LoRALinear, ColumnParallelLinear):
    """Rows of W and B sharded, A replicated."""


class LoRARowParallelLinear(LoRALinear, RowParallelLinear):
    """Columns of W and A sharded, B replicated."""


# Exact class -> its LoRA form and parallel mode.
LORA_CLASSES = {
    ColumnParallelLinear: (LoRAColumnParallelLinear, "column"),
    RowParallelLinear: (LoRARowParallelLinear, "row"),
}


def adapted_class(linear: torch.nn.Module) -> tuple[type, str] | None:
    """The LoRA class for this linear's exact class, and its parallel mode; None if there is none."""
    return LORA_CLASSES.get(type(linear))
