"""Adapters as PEFT has them: names, one flat rank and alpha, one tensor pair per projection. Pure, no Megatron."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass

import torch

from slime_plugins.lora.config import LoRAConfig
from slime_plugins.lora.errors import UsageError

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Projection:
    """The whole adapter of one Hugging Face linear, gathered from every shard."""

    name: str
    """``model.layers.3.self_attn.q_proj``, layer counted over the whole model."""
    A: torch.Tensor
    """[rank, in]"""
    B: torch.Tensor
    """[out, rank], rows in Hugging Face order."""
    scaling: float
    """Factor on B A."""


def read_base_config(hf_checkpoint: str | os.PathLike) -> dict:
    """``config.json`` of a Hugging Face checkpoint directory. Raises UsageError if there is none or it is no JSON."""
    path = os.path.join(hf_checkpoint, "config.json")
    try:
        with open(path, encoding="utf8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise UsageError(
            f"{hf_checkpoint} has no config.json; expected the directory of a Hugging Face checkpoint"
        ) from None
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is not JSON: {error}") from None


def to_peft(
    projections: list[Projection], config: LoRAConfig, hf_checkpoint: str | os.PathLike
) -> tuple[dict, dict[str, torch.Tensor]]:
    """``adapter_config.json`` and the tensors of ``adapter_model.safetensors`` in the flat form of design section 3.

    One rank (the largest; smaller ones padded with zero rows) and one alpha (other scalings folded into B), because
    SGLang ignores patterns and ``use_rslora`` in silence. No tensor shares storage with another (safetensors refuses).

    Raises:
        ValueError: no projection at all.
    """
    if not projections:
        raise ValueError("there is no adapter to export: no linear of this model carries one")
    base = read_base_config(hf_checkpoint)
    rank = max(p.A.shape[0] for p in projections)
    scaling = Counter(p.scaling for p in projections).most_common(1)[0][0]
    tensors = {}
    for p in projections:
        pad = rank - p.A.shape[0]
        A, B = p.A.detach().cpu(), p.B.detach().cpu()
        if p.scaling != scaling:
            B = (B.float() * (p.scaling / scaling)).to(B.dtype)
        A, B = torch.nn.functional.pad(A, (0, 0, 0, pad)), torch.nn.functional.pad(B, (0, pad))
        tensors[f"{PREFIX}{p.name}.lora_A.weight"] = A.contiguous().clone()
        tensors[f"{PREFIX}{p.name}.lora_B.weight"] = B.contiguous().clone()
    peft_config = config.to_peft(
        base_model=_base_name(hf_checkpoint),
        target_modules=_target_modules([p.name for p in projections], base["num_hidden_layers"]),
        rank=rank,
        alpha=_alpha(scaling, rank),
    )
    return peft_config, tensors


def _alpha(scaling: float, rank: int) -> float:
    """The alpha whose alpha / rank is ``scaling``, whole where a whole number gives it exactly."""
    whole = round(scaling * rank)
    return whole if whole / rank == scaling else scaling * rank


def _base_name(hf_checkpoint: str | os.PathLike) -> str:
    path = os.fspath(hf_checkpoint)
    return os.path.abspath(path) if os.path.isdir(path) else path


def _target_modules(names: list[str], num_layers: int) -> list[str]:
    """Leaf names where every layer has them; full names otherwise, or PEFT would add untrained adapters elsewhere."""
    leaves = Counter(name.rsplit(".", 1)[-1] for name in names)
    targets = dict.fromkeys(
        leaf if leaves[leaf := name.rsplit(".", 1)[-1]] == num_layers else name for name in names
    )
    return list(targets)
