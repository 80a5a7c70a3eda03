"""What an ``adapter_config.json`` says about one module: is it a target, its rank, its scale. Pure.

The rules are PEFT's (0.21, ``tuners_utils.check_target_module_exists``, ``utils.other.get_pattern_key``), kept here
so that neither reading nor checking an adapter imports peft.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from slime_plugins.lora.peft.patterns import pattern

PREFIX = "base_model.model."

ADAPTER_NAME = ".default"
"""What a live PeftModel has in its parameter names and a saved adapter has not."""

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight")


def parse_key(key: str) -> tuple[str, str] | None:
    """``base_model.model.<module>.lora_A.weight`` -> ``(module, "A")``; None for any other key.

    The spelling of a live model, ``lora_A.default.weight``, is read too.
    """
    match = _KEY.fullmatch(key)
    return (match["module"], match["half"]) if match else None


def key_of(module: str, half: str) -> str:
    """``("model.layers.0.mlp.up_proj", "B")`` -> ``base_model.model.model.layers.0.mlp.up_proj.lora_B.weight``."""
    return f"{PREFIX}{module}.lora_{half}.weight"


def is_target(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT would put an adapter on ``module`` (a linear of the base)."""
    excluded = config.get("exclude_modules")
    if isinstance(excluded, str) and excluded and pattern(excluded).fullmatch(module):
        return False
    if excluded and not isinstance(excluded, str) and _ends_with(module, excluded):
        return False
    targets = config.get("target_modules") or []
    if isinstance(targets, str):
        return targets == "all-linear" or pattern(targets).fullmatch(module)
    if module in targets:
        return True
    return _ends_with(module, targets) and _in_layers(config, module)


def module_rank(config: Mapping[str, Any], module: str) -> int:
    """Rank of the adapter on ``module``: its ``rank_pattern`` entry, else ``r``."""
    return _pattern_value(config.get("rank_pattern"), module, config["r"])


def module_alpha(config: Mapping[str, Any], module: str) -> float:
    """alpha of the adapter on ``module``: its ``alpha_pattern`` entry, else ``lora_alpha``."""
    return _pattern_value(config.get("alpha_pattern"), module, config["lora_alpha"])


def module_scaling(config: Mapping[str, Any], module: str) -> float:
    """alpha / rank, or alpha / sqrt(rank) with ``use_rslora`` (arXiv:2312.03732)."""
    rank = module_rank(config, module)
    return module_alpha(config, module) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def target_list(adapted: Iterable[str], base_linears: Iterable[str]) -> list[str]:
    """The shortest ``target_modules`` that selects exactly ``adapted`` among ``base_linears``.

    Of each name the shortest dotted end within its layer that no other linear has (``q_proj``, ``experts.3.up_proj``),
    or all of it.
    """
    adapted = set(adapted)
    others = {end for name in base_linears if name not in adapted for end in _ends(name)}
    return sorted({next((end for end in _ends(name) if end not in others), name) for name in adapted})


def _ends(name: str) -> list[str]:
    """Dotted ends of a name up to its layer's number, shortest first, none of them starting with a number."""
    pieces = re.sub(r"^.*\.layers\.\d+\.", "", name).split(".")
    return [".".join(pieces[i:]) for i in reversed(range(len(pieces))) if not pieces[i].isdigit()]


def _ends_with(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _in_layers(config: Mapping[str, Any], module: str) -> bool:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    names = config.get("layers_pattern") or [r"[^.]*"]
    for name in [names] if isinstance(names, str) else names:
        match = pattern(rf"(?:^|.*?\.){name}\.(\d+)\.").match(module)
        if match:
            return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _pattern_value(values: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for key, value in (values or {}).items():
        if pattern(rf"(.*\.)?({key})$").match(module):
            return value
    return default
