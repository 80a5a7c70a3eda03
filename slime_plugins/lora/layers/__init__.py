"""LoRA forms of Megatron's linears: a subclass per base class, entered in place by ``adapt``."""

from slime_plugins.lora.layers.adapter import LoRALinear, adapt
from slime_plugins.lora.layers.carrier import Carrier, hide_adapters, iter_carriers
from slime_plugins.lora.layers.forms.experts import linears_of_experts
from slime_plugins.lora.layers.forms.tokens import TokenRows, adapt_rows
from slime_plugins.lora.layers.frozen import FrozenLinear
from slime_plugins.lora.layers.kinds import KINDS, Kind, frozen_of, kind_of, shards_of
from slime_plugins.lora.layers.spec import AdapterSpec, check_gradients, spec_for

__all__ = [
    "KINDS",
    "AdapterSpec",
    "Carrier",
    "FrozenLinear",
    "Kind",
    "LoRALinear",
    "TokenRows",
    "adapt",
    "adapt_rows",
    "check_gradients",
    "frozen_of",
    "hide_adapters",
    "iter_carriers",
    "kind_of",
    "linears_of_experts",
    "shards_of",
    "spec_for",
]
