"""Adapters as PEFT has them: names, one flat rank and alpha, one tensor pair per projection. Pure, no Megatron."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.peft.config import is_target, key_of, target_list
from slime_plugins.lora.peft.experts_export import for_experts
from slime_plugins.lora.peft.experts_form import FORMATS
from slime_plugins.lora.peft.rows import VocabularyRows, with_rows
from slime_plugins.lora.projections import Projection


def to_peft(
    projections: list[Projection],
    hf_checkpoint: str | os.PathLike | BaseCheckpoint,
    *,
    dropout: float = 0.0,
    patterns: bool = False,
    moe_format: str = "per-expert",
    names: str = "module",
    rows: Sequence[VocabularyRows] = (),
) -> tuple[dict, dict[str, torch.Tensor]]:
    """``adapter_config.json`` and the tensors of ``adapter_model.safetensors``.

    By default in the flat form of design section 3: one rank (the largest; smaller ones padded with zero rows) and
    one alpha (other scalings folded into B), because SGLang ignores patterns and ``use_rslora`` in silence.
    ``patterns``: ranks and alphas as they were trained, in PEFT's ``rank_pattern`` and ``alpha_pattern``.
    ``dropout``: that it was trained with, for the config alone.
    ``moe_format``: of routed experts, see ``moe_form``; ``fused`` experts have no patterns of their own.
    ``names``: how modules are called, one of ``base.spelling.SPELLINGS``.
    ``rows``: of the vocabulary, trained beside the projections or alone (``peft.rows``).

    Raises:
        UsageError: ``hf_checkpoint`` is not a checkpoint directory, or a format that there is not.
        ValueError: no projection and no row at all, or a projection that does not fit the base.
    """
    if rows and not projections:
        return with_rows(None, rows, BaseCheckpoint.of(hf_checkpoint))
    if not projections:
        raise ValueError("there is no adapter to export: no linear of this model carries one")
    if moe_format not in FORMATS or (patterns and moe_format == "fused"):
        known = " or ".join(FORMATS)
        raise UsageError(f"--moe-format {moe_format}: expected {known}; with --peft-patterns only {FORMATS[0]}")
    base = BaseCheckpoint.of(hf_checkpoint)
    projections = [_as_spelled(p, base) for p in projections]
    for p in projections:
        _check_fits(p, base)
    projections = [replace(p, name=base.renamed(p.name, names)) for p in projections]
    ranks = [p.A.shape[0] for p in projections]
    rank = Counter(ranks).most_common(1)[0][0] if patterns else max(ranks)
    scaling = Counter(p.scaling for p in projections).most_common(1)[0][0]
    peft_config = flat_config(
        base_model=_base_name(base),
        **select((p.name for p in projections), base, names),
        rank=rank,
        alpha=_alpha(scaling, rank),
        dropout=dropout,
    )
    if patterns:
        alphas = {p.name: _alpha(p.scaling, r) for p, r in zip(projections, ranks)}
        peft_config["rank_pattern"] = {p.name: r for p, r in zip(projections, ranks) if r != rank}
        peft_config["alpha_pattern"] = {n: alpha for n, alpha in alphas.items() if alpha != peft_config["lora_alpha"]}
    tensors = {}
    for p in projections:
        A, B = (p.A.detach().cpu(), p.B.detach().cpu()) if patterns else _flat(p, rank, scaling)
        tensors[key_of(p.name, "A")] = A
        tensors[key_of(p.name, "B")] = B
    adapter = for_experts(peft_config, tensors, base, moe_format, names)
    return with_rows(adapter, rows, base) if rows else adapter


def select(adapted: Iterable[str], base: BaseCheckpoint, names: str = "module") -> dict[str, Any]:
    """``target_modules`` that select exactly these of the base's modules; ``exclude_modules`` where it needs them.

    A vision tower may have linears of the same leaf names; where none of them is adapted, it is left out as a whole.

    Args:
        names: what ``adapted`` are spelled in, one of ``base.spelling.SPELLINGS``.
    """
    known = [*base.names(names), *base.convolutions(names)]
    language, adapted = base.named(base.layer_prefix, names), set(adapted)

    def tower(module: str) -> str:
        return "" if module.startswith(str(language)) else module.removeprefix("model.").partition(".")[0]

    kept = {tower(module) for module in adapted} | {""}
    found: dict[str, Any] = {"target_modules": target_list(adapted, (m for m in known if tower(m) in kept))}
    if hit := {tower(m) for m in known if tower(m) not in kept and is_target(found, m)}:
        found["exclude_modules"] = rf"(model\.)?({'|'.join(sorted(hit))})\..*"
    return found


def flat_config(
    *,
    base_model: str | None,
    target_modules: list[str],
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    exclude_modules: str | None = None,
) -> dict[str, Any]:
    """The flat ``adapter_config.json`` that PEFT, transformers, vLLM and SGLang read alike.

    SGLang ignores ``use_rslora`` and the patterns, so there is no scaling but ``alpha / rank``, and one rank.
    """
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": dropout,
        "target_modules": target_modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    return config | ({"exclude_modules": exclude_modules} if exclude_modules else {})


def _as_spelled(p: Projection, base: BaseCheckpoint) -> Projection:
    """Under the name that the base has for it."""
    return replace(p, name=base.spelled(p.name))


def _check_fits(p: Projection, base: BaseCheckpoint) -> None:
    found = base.linear_shape(p.name)
    if found != p.shape:
        has = f"has {list(found)}" if found else "has none of that name"
        raise ValueError(
            f"the adapter of {p.name} is for a {list(p.shape)} matrix, but {base.directory} {has}; "
            "give the checkpoint that it was trained on"
        )


def _flat(p: Projection, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B padded to ``rank``, for the factor ``scaling``."""
    pad = rank - p.A.shape[0]
    if not pad and p.scaling == scaling:
        return p.A.detach().cpu(), p.B.detach().cpu()
    A, B = p.A.detach().cpu(), p.B.detach().cpu()
    if p.scaling != scaling:
        B = (B.float() * (p.scaling / scaling)).to(B.dtype)
    return torch.nn.functional.pad(A, (0, 0, 0, pad)), torch.nn.functional.pad(B, (0, pad))


def _alpha(scaling: float, rank: int) -> float:
    """The alpha whose alpha / rank is ``scaling``, whole where a whole number gives it exactly."""
    whole = round(scaling * rank)
    return whole if whole / rank == scaling else scaling * rank


def _base_name(base: BaseCheckpoint) -> str:
    return os.path.abspath(base.directory)
