"""Learning rates in Megatron's optimizers: LoRA+ (Hayou et al. 2024, arXiv:2402.12354), and a factor on all of them.

LoRA+ trains B at a multiple of A's rate. A group of parameters has its own ``max_lr`` and ``min_lr``, between which
Megatron's scheduler moves: multiplied alike, they keep the ratio in every style of decay, and in a warmup from 0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

RATIO = "lora_plus_ratio"
"""Key that a parameter group of Bs has in an optimizer with LoRA+."""
_MARK = "slime_lora_is_B"
"""Attribute by which Megatron tells the Bs: attributes are matched alike in all its versions, names are not."""


def with_lora_plus(get_optimizer: Callable, ratio: float) -> Callable:
    """Megatron's ``get_megatron_optimizer``, giving every B ``ratio`` times the learning rate of the rest."""
    if ratio == 1:
        return get_optimizer

    def get_optimizer_with_lora_plus(config, model_chunks, config_overrides=None, *args, **kwargs):
        for parameter in _Bs(model_chunks):
            setattr(parameter, _MARK, True)
        overrides = {**_standard(config, config_overrides), **_of_B(config, ratio)}
        optimizer = get_optimizer(config, model_chunks, overrides, *args, **kwargs)
        groups = [group for group in optimizer.param_groups if not group["default_config"] and "max_lr" in group]
        for group in groups:
            if group["max_lr"] == ratio * config.lr:
                group[RATIO] = ratio
                group["lr"] = group["max_lr"]  # for those who train without a scheduler
        return optimizer

    return get_optimizer_with_lora_plus


def ratio_of(optimizer) -> float:
    """Of a Megatron optimizer: 1 without LoRA+."""
    return next((group[RATIO] for group in optimizer.param_groups if RATIO in group), 1.0)


def scale_rates(optimizer, factor: float) -> None:
    """Let every group's rate be ``factor`` times its own highest, in an optimizer that no scheduler moves."""
    for group in optimizer.param_groups:
        group["lr"] = group["max_lr"] * factor


def _Bs(model_chunks) -> list:
    found = [p for chunk in model_chunks for name, p in chunk.named_parameters() if name.endswith(".lora_B")]
    return [parameter for parameter in found if parameter.requires_grad]


def _standard(config, overrides) -> dict[Any, Any]:
    """What was given, or what Megatron does of its own accord where nothing is."""
    from megatron.core import optimizer

    if overrides is None and hasattr(optimizer, "get_standard_config_overrides"):
        return optimizer.get_standard_config_overrides(config)
    return overrides or {}


def _of_B(config, ratio: float) -> dict[Any, Any]:
    """The override in the form of this Megatron: fields of a group since core 0.16, before that a whole config."""
    from megatron.core import optimizer

    fields = {"lr": ratio * config.lr} | ({"min_lr": ratio * config.min_lr} if config.min_lr is not None else {})
    key = optimizer.ParamKey(attr=_MARK)
    if hasattr(optimizer, "get_standard_config_overrides"):
        return {key: {"max_" * (name == "lr") + name: value for name, value in fields.items()}}
    of_B = copy.copy(config)
    for name, value in fields.items():
        setattr(of_B, name, value)
    return {key: of_B}
