"""LoRA forms of Megatron's linears: a subclass per base class, entered in place by ``adapt``."""

from slime_plugins.lora.layers.adapter import LoRALinear, adapt, hide_adapters
from slime_plugins.lora.layers.forms.experts import OneExpert, linears_of_experts
from slime_plugins.lora.layers.forms.megatron import adapted_class, weight_shards
from slime_plugins.lora.layers.spec import AdapterSpec, check_gradients, spec_for

__all__ = [
    "AdapterSpec",
    "LoRALinear",
    "OneExpert",
    "adapt",
    "adapted_class",
    "check_gradients",
    "hide_adapters",
    "linears_of_experts",
    "spec_for",
    "weight_shards",
]
