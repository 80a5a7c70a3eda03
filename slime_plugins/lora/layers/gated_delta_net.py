"""Megatron's own linear attention (``megatron.core.ssm.gated_delta_net``): frozen, and said to be.

It cuts q, k, v, z, b and a inside one column-parallel ``in_proj``, head by head; no form here does. slime's modules
(``self_attention.linear_attn``) keep Hugging Face's projections and are adapted.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.names import LINEARS, in_linear_attention
from slime_plugins.lora.targets import ALL_LINEAR, Targets, matches

OF = "Megatron's GatedDeltaNet"
INSTEAD = "slime's linear attention, --spec slime_plugins.models.qwen3_next or qwen3_5"


def is_gated_delta_net(module: torch.nn.Module) -> bool:
    """By name: a model that has it need not be the first to import it."""
    return any(kind.__name__ == "GatedDeltaNet" for kind in type(module).__mro__)


def refuse_linears(targets: Targets, matched: Iterable[str], linears: Iterable[str]) -> set[str]:
    """Refuse a target that names linears of such modules, by their name or by Hugging Face's for what is in them.

    As with the router, a wildcard over a layer does not name them, unless it names nothing else.

    Args:
        matched: entries that name something that can be adapted.
        linears: global names, ``decoder.layers.3.self_attention.in_proj``, on any pipeline stage.
    Returns:
        Entries, of targets and excludes, that name one of them and are no mistake.
    Raises:
        UsageError: a target names one that no exclude names.
    """
    passed, matched = set[str](), set(matched)
    for linear in linears:
        spellings = _spellings(linear)
        excludes = {entry for entry in targets.exclude_modules if _names(entry, spellings, matched)}
        entries = [entry for entry in targets.target_modules if _names(entry, spellings, matched)]
        if entries and not excludes:
            leaf = linear.rsplit(".", 1)[1]
            raise UsageError(
                f"LoRA target {entries[0]} names {linear} of {OF}, which has no LoRA form and stays frozen; build the "
                f"model of {INSTEAD}, or exclude {leaf}"
            )
        passed |= {*entries, *excludes}
    return passed


def _spellings(linear: str) -> list[str]:
    """``decoder.layers.3.self_attention.in_proj``, ``model.layers.3.linear_attn.in_proj_qkv``, ..."""
    _, _, layer, path = linear.split(".", 3)
    mine = path.rsplit(".", 1)[1]
    leaves = [leaf for one in LINEARS.values() if in_linear_attention(one.path) for leaf in one.leaves]
    inside = [leaf for leaf in leaves if leaf == mine or leaf.startswith(f"{mine}_")]
    return [linear, *(f"model.layers.{layer}.linear_attn.{leaf}" for leaf in inside)]


def _names(entry: str, spellings: Iterable[str], matched: set[str]) -> bool:
    leaf = entry.rsplit(".", 1)[-1]
    return entry != ALL_LINEAR and any(
        matches(entry, name) and (entry not in matched or leaf == name.rsplit(".", 1)[1]) for name in spellings
    )
