"""What a model has beside its language model, as slime's Qwen3.5 has ``model.visual``: frozen, and said to be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.targets import matches


@dataclass(frozen=True)
class Tower:
    """One of them, whole on every rank that has it."""

    name: str
    """Its path in the model: ``model.visual``."""
    parameters: int
    linears: tuple[str, ...]
    """Paths in the model of everything in it that has a matrix."""


def towers_of(chunk: torch.nn.Module) -> list[Tower]:
    """Of a chunk, not wrapped, that keeps its language model in ``language_model``; [] for others."""
    language, found = chunk._modules.get("language_model"), []
    for name, child in chunk.named_children() if language is not None else ():
        if child is language:
            continue
        while len(own := list(child.named_children())) == 1 and not list(child.parameters(recurse=False)):
            name, child = f"{name}.{own[0][0]}", own[0][1]
        parameters = sum(parameter.numel() for parameter in child.parameters())
        linears = [f"{name}.{path}" for path, one in child.named_modules() if path and _has_matrix(one)]
        if parameters:
            found.append(Tower(name, parameters, tuple(linears)))
    return found


def _has_matrix(module: torch.nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))


def refuse_targets(entries: Iterable[str], towers: Iterable[Tower]) -> None:
    """Raise UsageError for an entry that names something in a tower. ``entries``: those that named nothing else."""
    towers = list(towers)
    for entry in entries:
        for tower in towers:
            for name in (tower.name, *tower.linears):
                if matches(entry, name):
                    raise UsageError(
                        f"LoRA target {entry} names {name}: {tower.name} stays frozen, adapters go into the language "
                        f"model alone; drop {entry}"
                    )
