"""An adapter as SGLang takes it, where that is not as PEFT has it: the projections of linear attention.

SGLang (0.5.15 to 0.5.23) has one linear for Hugging Face's in_proj_qkv and in_proj_z, and refuses adapters that have
those names as targets. It takes all four of in_proj_q, in_proj_k, in_proj_v and in_proj_z: here q, k and v are the
rows of in_proj_qkv's B with its A, which is the same update at the same rank; one of the two that has no adapter gets
zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.peft.config import key_of, parse_key
from slime_plugins.lora.server.names import QKV, Z, served_leaf

_SLICES = ("in_proj_q", "in_proj_k", "in_proj_v")


def for_sglang(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], base: BaseCheckpoint
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and tensors of a flat export, with these projections in SGLang's names. Others are passed on."""
    linears = {parsed[0].rpartition(".")[0] for parsed in map(parse_key, tensors) if parsed and _is_input(parsed[0])}
    if not linears:
        return dict(config), dict(tensors)
    text = base.text_config
    keys, values = (text[f"linear_num_{kind}_heads"] * text[f"linear_{kind}_head_dim"] for kind in ("key", "value"))
    found = {key: tensor for key, tensor in tensors.items() if not _is_input((parse_key(key) or ("", ""))[0])}
    for parent in sorted(linears):
        pairs = {leaf: _pair(tensors, f"{parent}.{leaf}") for leaf in (QKV, Z)}
        (A, B) = pairs[QKV] or _zeros(pairs[Z], 2 * keys + values)
        split = zip(_SLICES, B.split([keys, keys, values]))
        parts = {leaf: (A, rows) for leaf, rows in split} | {Z: pairs[Z] or _zeros(pairs[QKV], values)}
        for leaf, pair in parts.items():
            for half, tensor in zip("AB", pair):
                found[key_of(f"{parent}.{leaf}", half)] = tensor.contiguous()
    targets = dict.fromkeys(_served_target(name) for name in config["target_modules"])
    return {**config, "target_modules": list(targets)}, found


def _is_input(module: str) -> bool:
    return module.endswith((f".linear_attn.{QKV}", f".linear_attn.{Z}"))


def _served_target(name: str) -> str:
    parent, dot, leaf = name.rpartition(".")
    return f"{parent}{dot}{served_leaf(leaf)}"


def _pair(tensors: Mapping[str, torch.Tensor], module: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    keys = key_of(module, "A"), key_of(module, "B")
    return (tensors[keys[0]], tensors[keys[1]]) if keys[0] in tensors else None


def _zeros(other: tuple[torch.Tensor, torch.Tensor] | None, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An adapter of nothing, of the other's rank and inputs."""
    assert other is not None
    return torch.zeros_like(other[0]), other[1].new_zeros(rows, other[1].shape[1])
