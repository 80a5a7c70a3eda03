"""LoRA forms of Megatron-Core's own linears and of its router."""

from __future__ import annotations

from abc import ABC

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.router import TopKRouter

from slime_plugins.lora.layers.adapter import LoRALinear


class LoRAColumnParallelLinear(LoRALinear, ColumnParallelLinear):
    """Rows of W and B sharded, A replicated."""


class LoRARowParallelLinear(LoRALinear, RowParallelLinear):
    """Columns of W and A sharded, B replicated."""


class _AbstractLoRALinear(ABC, LoRALinear):
    """The mixin with the base that Megatron's router has first, without which Python refuses the change of class.

    Behind that base, ``LoRALinear`` comes after the router's own class: ``forward`` stays the router's.
    """


class LoRATopKRouter(_AbstractLoRALinear, TopKRouter):
    """W, A and B whole on every tensor-parallel rank; the logits get the low-rank term, in the router's own dtype.

    Adapted only where a target names it.
    """

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """input [..., hidden] -> logits [..., num_experts]."""
        logits = super().gating(input)
        if not self.lora_enabled:
            return logits
        _, h, exchanges = self._lora_down(input.to(logits.dtype))
        return self._lora_up(logits, h, exchanges)
