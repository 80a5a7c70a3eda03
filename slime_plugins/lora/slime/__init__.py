"""What slime calls at its seams (see ``seams``). Without ``--use-lora`` every hook passes through to slime's own code.

A hook that is a decorator keeps the signature and the result of what it decorates. Hooks are imported when a slime
module that uses them is: the driver and the rollout processes never import Megatron because of them.
"""

from __future__ import annotations

import importlib

_HOOKS = {
    "flags": "launch",
    "validation": "launch",
    "model_provider": "launch",
    "serving": "serving",
    "loading": "checkpoints",
    "saving": "checkpoints",
    "saving_hf": "checkpoints",
    "weights_backuper": "policies",
    "other_policy": "policies",
    "syncing": "merged_sync",
    "base_parameters": "merged_sync",
    "merging_one": "merged_sync",
    "merging_bucket": "merged_sync",
    "weight_updater": "adapter_sync",
    "naming_adapter": "requests",
    "request_fields": "requests",
    "use_lora_adapter": "requests",
    "measuring": "metrics",
    "optimizing": "launch",
    "teacher_prompts": "distillation",
}

__all__ = list(_HOOKS)


def __getattr__(name: str):
    if name not in _HOOKS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.hooks.{_HOOKS[name]}"), name)
