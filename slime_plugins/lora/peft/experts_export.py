"""The experts of an exported adapter: which form they take, and what PEFT has to be told about the rest of the model.

PEFT (0.21, ``utils/transformers_weight_conversion``) maps the names gate_proj, up_proj and down_proj of a model with
experts to its stacked parameters wherever they stand, and forgets the dense and shared MLPs of the same leaf names
(its issue 3711). So those are in ``target_parameters`` as well, as the ``weight`` of their linear, with the same keys
in the file. vLLM and SGLang do not read that field; SGLang wants their names in ``target_modules``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import torch

from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.names import in_experts
from slime_plugins.lora.peft.config import key_of, parse_key, target_list
from slime_plugins.lora.peft.experts_form import PARAMETER_OF, STACKED, WEIGHT, experts_of, stack

_GATE_UP = r".*\.gate_up_proj"  # as PEFT writes it when it converts an adapter
_NOT_CONVERTED = {"qwen2_moe", "qwen3_5_moe_text"}
"""Families of which PEFT (0.21) converts the keys of single experts, but not the config that goes with them."""
FUSED_ALONE = {"qwen3_5_moe", "qwen3_vl_moe"}
"""Families of which PEFT (0.21) converts neither: it reads their experts in the fused form alone."""

Tensors = dict[str, torch.Tensor]


def for_experts(
    config: dict, tensors: Tensors, base: BaseCheckpoint, moe_format: str, names: str = "module"
) -> tuple[dict, Tensors]:
    """A per-expert adapter in the form asked for; without experts in the base, as it is.

    Raises:
        ValueError: ``fused`` where some experts of a layer have no adapter.
    """
    num_experts = Counter(experts_of(name) for name in base.names(names) if name.endswith(".down_proj"))
    del num_experts[None]
    if not num_experts:
        return config, tensors
    modules = [parsed[0] for parsed in map(parse_key, tensors) if parsed and parsed[1] == "A"]
    adapts_experts = any(map(experts_of, modules))
    if adapts_experts and moe_format == "fused":
        return _fused(config, tensors, set(base.names(names)), num_experts)
    family = base.model_type(names)
    if family in FUSED_ALONE:
        return config, tensors
    parameters = _mlps_as_parameters(modules)
    if family in _NOT_CONVERTED:
        parameters = [f"mlp.experts.{parameter}" for parameter in STACKED] if adapts_experts else []
        config = config | (_doubled(config) if adapts_experts else {})
    return (config | {"target_parameters": parameters} if parameters else config), tensors


def unread_by_peft(base: BaseCheckpoint, names: str, moe_format: str, modules: Iterable[str]) -> str | None:
    """Why PEFT leaves out experts of an adapter of these modules, for people; None where it does not."""
    family = base.model_type(names)
    if moe_format == "fused" or family not in FUSED_ALONE or not any(map(in_experts, modules)):
        return None
    return (
        f"PEFT and transformers do not read the experts of {family} one by one and leave them out; for them use "
        "--moe-format fused, which SGLang does not read"
    )


def _fused(config: dict, tensors: Tensors, linears: set[str], num_experts: Counter) -> tuple[dict, Tensors]:
    modules = [parsed[0] for parsed in map(parse_key, tensors) if parsed and parsed[1] == "A"]
    pairs = {m: (tensors[key_of(m, "A")], tensors[key_of(m, "B")]) for m in modules}
    stacked, ranks = stack(pairs, num_experts.__getitem__)
    adapted = {f"{experts_of(m)}.{PARAMETER_OF[m.rpartition('.')[2]]}" for m in modules if experts_of(m)}
    every = {f"{experts}.{parameter}" for experts in num_experts for parameter in STACKED}
    others = [m for m in modules if m.rpartition(".")[2] not in PARAMETER_OF]
    config = config | {
        "target_modules": target_list(others, linears - {"lm_head"}),
        "target_parameters": sorted([*_mlps_as_parameters(modules), *target_list(adapted, every)]),
    }
    if ranks.get("gate_up_proj", config["r"]) != config["r"]:
        config |= _doubled(config)
    return config, {key_of(m, half): pair[i] for m, pair in stacked.items() for i, half in enumerate("AB")}


def _mlps_as_parameters(modules: list[str]) -> list[str]:
    """The adapted MLPs outside the experts, by their path in the layer."""
    lost = (m for m in modules if m.rpartition(".")[2] in PARAMETER_OF and not experts_of(m))
    return sorted({re.sub(r"^.*\.layers\.\d+\.", "", m) + WEIGHT for m in lost})


def _doubled(config: dict) -> dict:
    """gate and up with an A of their own each: twice the rank at the same scaling."""
    doubled = {"rank_pattern": 2 * config["r"], "alpha_pattern": 2 * config["lora_alpha"]}
    return {field: (config.get(field) or {}) | {_GATE_UP: value} for field, value in doubled.items()}
