"""LoRA forms of Megatron's linears: a subclass per base class, entered in place by ``adapt``."""

from slime_plugins.lora.layers.adapter import LoRALinear, adapt, hide_adapters
from slime_plugins.lora.layers.megatron import adapted_class
from slime_plugins.lora.layers.spec import AdapterSpec, spec_for

__all__ = ["AdapterSpec", "LoRALinear", "adapt", "adapted_class", "hide_adapters", "spec_for"]
