"""LoRA forms of Megatron-Core's own linears and of its router."""

from __future__ import annotations

from abc import ABC

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.router import TopKRouter

from slime_plugins.lora.layers.adapter import LoRALinear
from slime_plugins.lora.layers.choice import why_not_fused


class _LoRAMegatronLinear(LoRALinear):
    """Mixin of the two below. Fused, the adapter is in the product that the base's own forward calls."""

    def lora_why_not_fused(self) -> str:
        if not callable(getattr(ColumnParallelLinear, "_forward_impl", None)):
            return "a Megatron whose linears have no _forward_impl"
        return why_not_fused(self)

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Megatron's product [..., I] -> [..., O], with the exchanges that it says."""
        if self.lora_fused is None:
            return super()._forward_impl(input, weight, *args, **kwargs)  # type: ignore[misc]
        return self.lora_fused(
            input, weight, kwargs["bias"], gathers=kwargs["sequence_parallel"], sums_dx=kwargs["allreduce_dgrad"]
        )


class LoRAColumnParallelLinear(_LoRAMegatronLinear, ColumnParallelLinear):
    """Rows of W and B sharded, A replicated."""


class LoRARowParallelLinear(_LoRAMegatronLinear, RowParallelLinear):
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
