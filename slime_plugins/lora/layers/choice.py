"""How a linear runs its adapter: fused into one autograd function (``fused``), or by taps around it (``lowrank``).

Fused is faster on a GPU and keeps less, and needs to know the whole linear; taps go around anything. Chosen once, when
the adapter is put in, and said in the report.
"""

from __future__ import annotations

from typing import Any

import torch

from slime_plugins.lora.names import is_adapter
from slime_plugins.lora.quant.packed import PackedWeight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not_fused(linear: Any) -> str:
    """What forbids a dense Megatron or TransformerEngine linear with an adapter to run fused; "" if nothing does."""
    base, config = linear.lora_base, linear.lora_base.config
    weights = base.parameters
    if linear.lora.config.dropout:
        return "LoRA dropout"
    if any(isinstance(weight, PackedWeight) for weight in weights):
        return "a base in codes"
    if any(parameter.requires_grad for name, parameter in linear.named_parameters() if not is_adapter(name)):
        return "a base that trains"
    if any(weight.dtype not in DTYPES for weight in weights):
        return f"a base in {weights[0].dtype}"
    for flag, value in _OTHER_PRODUCTS.items():
        if getattr(config, flag, value) != value:
            return f"{flag} is {getattr(config, flag)}"
    return ""


_OTHER_PRODUCTS = {"fp8": None, "fp4": None, "batch_invariant_mode": False, "cpu_offloading": False}
"""Fields of Megatron's TransformerConfig under which a linear is more than a product -> the value without."""
