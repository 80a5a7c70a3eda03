"""LoRA forms of Megatron's TransformerEngine linears.

Imported where Megatron's TransformerEngine module is loaded already, and nowhere else (see ``kinds``).
"""

from __future__ import annotations

import torch
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelGroupedLinear,
    TEColumnParallelLinear,
    TELayerNormColumnParallelLinear,
    TELinear,
    TERowParallelGroupedLinear,
    TERowParallelLinear,
)

from slime_plugins.lora.layers.adapter import LoRALinear
from slime_plugins.lora.layers.forms.experts import LoRAExperts


class LoRATEColumnParallelLinear(LoRALinear, TEColumnParallelLinear):
    """Rows of W and B sharded, A replicated."""


class LoRATERowParallelLinear(LoRALinear, TERowParallelLinear):
    """Columns of W and A sharded, B replicated."""


class LoRATELinear(LoRALinear, TELinear):
    """W, A and B whole on every rank. Megatron uses TELinear itself for duplicated weights only (MLA)."""


class LoRATELayerNormColumnParallelLinear(LoRALinear, TELayerNormColumnParallelLinear):
    """The same behind a fused norm: A sees the normalised input, this rank's tokens only (design hazard 13).

    TE hands out that input, which it has at hand anyway, and adds the gradient of it to the one of its own product
    before the norm's backward. It comes with the base's output, so the first tap follows the base here.
    """

    @property
    def return_layernorm_output(self) -> bool:
        """Read by TE at every forward, in place of the instance attribute of this name."""
        return self.lora_enabled

    def forward(self, x: torch.Tensor):
        """x: [..., I], not normalised. Returns output and bias, as the base does."""
        result = super(LoRALinear, self).forward(x)
        if not self.lora_enabled:
            return result
        # Megatron passes TE's (output, bias, normed) on, and makes ((output, normed), None) of TE's (output, normed).
        output, bias, normed = result if self.te_return_bias else (result[0][0], None, result[0][1])
        _, h, exchanges = self._lora_down(normed)
        return self._lora_up(output, h, exchanges), bias


class LoRATEColumnParallelGroupedLinear(LoRAExperts, TEColumnParallelGroupedLinear):
    """Experts: rows of W and B sharded over expert-tensor-parallel ranks, A replicated."""


class LoRATERowParallelGroupedLinear(LoRAExperts, TERowParallelGroupedLinear):
    """Experts: columns of W and A sharded over expert-tensor-parallel ranks, B replicated."""


# Exact class -> its LoRA form and parallel mode: rows of ``kinds``.
FORMS: dict[type, tuple[type[LoRALinear], str]] = {
    TELayerNormColumnParallelLinear: (LoRATELayerNormColumnParallelLinear, "column"),
    TEColumnParallelLinear: (LoRATEColumnParallelLinear, "column"),
    TERowParallelLinear: (LoRATERowParallelLinear, "row"),
    TELinear: (LoRATELinear, "duplicated"),
    TEColumnParallelGroupedLinear: (LoRATEColumnParallelGroupedLinear, "column"),
    TERowParallelGroupedLinear: (LoRATERowParallelGroupedLinear, "row"),
}
