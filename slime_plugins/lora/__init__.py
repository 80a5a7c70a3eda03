"""LoRA for Megatron-Core models and the slime RL trainer. See docs/ and the functions named in ``__all__``."""

from __future__ import annotations

import importlib

# Name -> module. Imported on first use: flags and configs need neither torch nor Megatron (8 seconds of import).
_PUBLIC = {
    "LoRAConfig": "config",
    "add_lora_arguments": "arguments",
    "validate_lora_args": "arguments",
    "load_base": "rehearsal.load",
    "apply_lora": "inject",
    "LoRAReport": "inject",
    "summing_stages": "tokens",
    "BaseQuant": "base.quantization",
    "quantize_base": "quantize",
    "adapters_disabled": "adapters",
    "merged": "adapters",
    "save_adapter": "checkpoint.save",
    "load_adapter": "checkpoint.load",
    "export_peft": "ends.export",
    "import_peft": "ends.import_",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
