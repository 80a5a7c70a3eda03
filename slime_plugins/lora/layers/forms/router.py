"""The LoRA form of Megatron's router. Adapted only where a target names it."""

from __future__ import annotations

from abc import ABC

import torch
from megatron.core.transformer.moe.router import TopKRouter

from slime_plugins.lora.layers.adapter import LoRALinear


class _AbstractLoRALinear(ABC, LoRALinear):
    """The mixin with the base that Megatron's router has first, without which Python refuses the change of class."""


class LoRATopKRouter(_AbstractLoRALinear, TopKRouter):
    """W, A and B whole on every tensor-parallel rank; the logits get the low-rank term, in the router's own dtype."""

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """input [..., hidden] -> logits [..., num_experts]."""
        logits = super().gating(input)
        if not self.lora_enabled:
            return logits
        _, h, exchanges = self._lora_down(input.to(logits.dtype))
        return self._lora_up(logits, h, exchanges)


# Exact class -> its LoRA form and parallel mode.
LORA_CLASSES = {TopKRouter: (LoRATopKRouter, "duplicated")}
