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
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from slime_plugins.lora.layers.adapter import LoRALinear
from slime_plugins.lora.layers.choice import why_not_fused
from slime_plugins.lora.layers.forms.experts import LoRAExperts
from slime_plugins.lora.layers.fused import Norm


class _LoRATELinear(LoRALinear):
    """Mixin of the dense ones. Fused, TE's module gives the weights, the norm and the flags, and none of its kernels.

    The products and the norm are torch's, with the adapters on and off alike: the reference and a teacher, which are
    the same model with them off, differ from it by the adapter and by no rounding.
    """

    # Of TE's modules and Megatron's wrappers:
    weight: torch.Tensor
    bias: torch.Tensor
    use_bias: bool
    te_return_bias: bool
    parallel_mode: str | None
    sequence_parallel: bool
    tp_size: int
    layer_norm_weight: torch.Tensor
    eps: float

    def lora_why_not_fused(self) -> str:
        overlaps = [name for name in dir(self) if name.startswith("ub_") and getattr(self, name) is True]
        if overlaps:
            return f"TransformerEngine's communication overlap ({overlaps[0]})"
        if getattr(self, "symmetric_ar_type", None) is not None:
            return "symmetric_ar_type"
        return why_not_fused(self)

    def forward(self, x: torch.Tensor):
        """x [..., I] -> output and bias, as the base gives them."""
        if self.lora_fused is None:
            return super().forward(x)
        column = self.parallel_mode == "column"
        bias = self.bias if self.use_bias else None
        after = self.parallel_mode == "row"  # the bias of a row-parallel linear comes after the sum
        y = self.lora_fused(
            x,
            self.weight,
            None if after or self.te_return_bias else bias,
            norm=self._lora_norm(),
            gathers=column and self.sequence_parallel,
            sums_dx=column and not self.sequence_parallel,
        )
        if after and self.tp_size > 1:
            reduce = (
                reduce_scatter_to_sequence_parallel_region
                if self.sequence_parallel
                else reduce_from_tensor_model_parallel_region
            )
            y = reduce(y, group=self.lora_group)
        if self.te_return_bias:
            return y, bias
        return (y + bias if after and bias is not None else y), None

    def _lora_norm(self) -> Norm | None:
        """What the fused form computes in front."""
        return None


class LoRATEColumnParallelLinear(_LoRATELinear, TEColumnParallelLinear):
    """Rows of W and B sharded, A replicated."""


class LoRATERowParallelLinear(_LoRATELinear, TERowParallelLinear):
    """Columns of W and A sharded, B replicated."""


class LoRATELinear(_LoRATELinear, TELinear):
    """W, A and B whole on every rank. Megatron uses TELinear itself for duplicated weights only (MLA)."""


class LoRATELayerNormColumnParallelLinear(_LoRATELinear, TELayerNormColumnParallelLinear):
    """The same behind a fused norm: A sees the normalised input, this rank's tokens only (design hazard 13).

    By taps, TE hands out that input, which it has at hand anyway, and adds the gradient of it to the one of its own
    product before the norm's backward. It comes with the base's output, so the first tap follows the base here.
    """

    def lora_why_not_fused(self) -> str:
        if self.normalization != "RMSNorm":
            return f"a {self.normalization} in front"
        if self.zero_centered_gamma:
            return "a zero-centered norm in front"
        if torch.cuda.is_available() and not hasattr(torch.ops.aten, "_fused_rms_norm"):
            return "a torch before 2.9, without a fused RMSNorm"
        return super().lora_why_not_fused()

    @property
    def return_layernorm_output(self) -> bool:
        """Read by TE at every forward, in place of the instance attribute of this name."""
        return self.lora_enabled and self.lora_fused is None

    def _lora_norm(self) -> Norm:
        return Norm(self.layer_norm_weight, self.eps)

    def forward(self, x: torch.Tensor):
        """x: [..., I], not normalised. Returns output and bias, as the base does."""
        if self.lora_fused is not None:
            return super().forward(x)
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
