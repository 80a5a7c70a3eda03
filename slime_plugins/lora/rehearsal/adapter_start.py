"""The adapter that a run starts from, if it does: what it must be, known before any process starts."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from slime_plugins.lora.arguments import base_args, base_flags, lora_args, lora_flags
from slime_plugins.lora.base.decoder import HFBase
from slime_plugins.lora.base.quantization import BaseQuant, check_flags
from slime_plugins.lora.checkpoint import directory
from slime_plugins.lora.checkpoint.manifest import Manifest
from slime_plugins.lora.config import LoRAConfig
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.names import hf_names, megatron_name
from slime_plugins.lora.peft.extra import extra_of, put_extra, refuse_part_of_base
from slime_plugins.lora.rehearsal.settings import MAX_COUNT, Settings
from slime_plugins.lora.targets import Targets, check_all_matched

REFERENCE = "reference"
"""Beside the steps of a run: the adapter that it measures its KL from, with ``--lora-ref start``."""


def config_of_flags(flags: Mapping[str, Any], seed: int) -> LoRAConfig:
    """Of LoRA flags by destination, defaults for those that are absent."""
    return LoRAConfig.from_args(argparse.Namespace(**{**lora_args(LoRAConfig()), **flags}, seed=seed))


def config_of_start(
    settings: Settings, flags: Mapping[str, Any], base: HFBase, progress: Callable[[str], None]
) -> LoRAConfig:
    """The config of the adapter that the run starts from, or that of the flags where it starts from none.

    Args:
        flags: LoRA flags that were given, by destination. Those that an adapter's values fix (ranks, scaling, layout,
            targets) must be those of the start; dropout, dtype and the like may change.
    Raises:
        UsageError: they are not, naming the flags that are; there is no adapter; no step is left to do.
        ValueError, OSError: the adapter is damaged.
    """
    start = settings.load or settings.lora_adapter_path
    if start is None:
        return settings.lora
    what = f"{'--load' if settings.load else '--lora-adapter-path'} {start}"
    refuse_part_of_base(_directory_of(start), base.shapes())
    theirs = _config_at(settings, what, flags.get("lora_layout"), progress)
    theirs = dataclasses.replace(theirs, seed=settings.seed)
    if not flags:
        progress(f"{what}: {lora_flags(theirs)}")
        return theirs
    # Partly given flags speak of what they name alone.
    wanted = config_of_flags({**lora_args(theirs), **flags}, settings.seed)
    different = _difference(_adapted(theirs, base), _adapted(wanted, base))
    if wanted.trainable_token_indices != theirs.trainable_token_indices:
        different = "other vocabulary rows train there"
    if wanted.layout != theirs.layout:
        different = f"layout {theirs.layout} there, {wanted.layout} by the flags"
    if different:
        raise UsageError(
            f"{what} does not fit the LoRA flags ({different}); leave them out, or give: {lora_flags(theirs)}"
        )
    return wanted


def base_of_start(settings: Settings, flags: Mapping[str, Any], progress: Callable[[str], None]) -> BaseQuant | None:
    """What the base is stored as: by its flags, or as it was under the adapter that the run starts from.

    Args:
        flags: of ``base_args`` that were given, by destination.
    Raises:
        UsageError: flags that do not go together, or are not those of the checkpoint.
        ValueError, OSError: the checkpoint is damaged.
    """
    args = argparse.Namespace(**{**base_args(None), **flags}, lora_only_trainable=True)
    check_flags(args)
    given, start = BaseQuant.from_args(args), settings.load or settings.lora_adapter_path
    if start is None:
        return given
    if (Path(start) / "adapter_config.json").is_file():
        from slime_plugins.lora.peft.directory import open_tensors

        theirs = open_tensors(start).base_quant
        if theirs is None:  # another's, or one of a dense base: nothing is noted
            return given
    else:
        noted = Manifest.read(directory.find(start)).base.get("quantization")
        theirs = None if noted is None else BaseQuant.read(noted, start)
    what = f"{'--load' if settings.load else '--lora-adapter-path'} {start}"
    if flags and given != theirs:
        raise UsageError(f"{what} does not fit the flags of the base; leave them out, or give: {base_flags(theirs)}")
    if theirs is not None and not flags:
        progress(f"{what}: {base_flags(theirs)}")
    return theirs


def _config_at(settings: Settings, what: str, layout: str | None, progress: Callable[[str], None]) -> LoRAConfig:
    path = Path(settings.load or settings.lora_adapter_path or "")
    if not settings.load and (path / "adapter_config.json").is_file():
        return LoRAConfig.from_peft(path, layout)
    if settings.load and (path / "adapter_config.json").is_file():
        raise UsageError(f"{what} is a PEFT adapter; start from it with --lora-adapter-path")
    manifest = Manifest.read(directory.find(path))
    if settings.load:
        if (manifest.step or 0) >= settings.steps:
            raise UsageError(f"{what}: it is at step {manifest.step}; --steps {settings.steps} leaves none to do")
        if manifest.optimizer is None:
            progress(f"{what}: it has no optimizer state, the optimizer starts anew")
    return manifest.config


def kept_reference(settings: Settings) -> Path | None:
    """The checkpoint of the reference policy that the run to go on with has kept; None: there is none, or no such run.

    Raises:
        UsageError: a resumed run whose reference is not there, or was another one than the flags say.
    """
    started = settings.lora_ref == "start"
    if settings.load is None:
        if settings.save and not started and (Path(settings.save) / REFERENCE).exists():
            raise UsageError(
                f"--save {settings.save} holds the reference policy of another run, which resumes would take for this "
                "one's; name another directory"
            )
        return None
    kept = _directory_of(settings.load) / REFERENCE
    if kept.exists() and not started:
        raise UsageError(
            f"--load {settings.load} was trained with --lora-ref start, its reference policy is {kept}; give "
            "--lora-ref start, or start a new run from its adapter with --lora-adapter-path"
        )
    if started and not kept.exists():
        raise UsageError(
            f"--lora-ref start: {settings.load} has kept no {REFERENCE}/; resume with --lora-ref base, or start anew "
            "with --lora-adapter-path"
        )
    return kept if started else None


def carry_extra(settings: Settings, adapter_dir: Path) -> list[str]:
    """Put what was trained beside the adapter that the run starts from beside what it leaves; returns its names."""
    start = settings.load or settings.lora_adapter_path
    found = {} if start is None else extra_of(_directory_of(start))
    for place in (adapter_dir, *([Path(settings.save)] if settings.save else ())):
        put_extra(place, found)
    return list(found)


def _directory_of(start: str) -> Path:
    """Where what was trained beside an adapter lies: below a PEFT directory, or below the run of a checkpoint."""
    path = Path(start)
    return path if (path / "adapter_config.json").is_file() else directory.find(path).parent


def check_config(config: LoRAConfig, base: HFBase) -> None:
    """Raise UsageError for targets that name nothing, a rank above what its matrix can hold, an endless alpha."""
    alpha = max(config.alpha, *config.alpha_pattern.values(), 0)
    if alpha > MAX_COUNT:
        raise UsageError(f"LoRA alpha is {alpha:g}; expected at most {MAX_COUNT:,}")
    beyond = [i for i in config.trainable_token_indices if i >= base.vocab_size]
    if beyond:
        raise UsageError(
            f"--trainable-token-indices: {base.path} has {base.vocab_size:,} rows, none for token {beyond[0]}; add "
            "the tokens first (slime-lora add-tokens)"
        )
    targets = Targets(config.target_modules, config.exclude_modules)
    names = dict.fromkeys(megatron_name(name)[0] for name in base.linears())
    adapted = [name for name in names if targets.parts_of(name)]
    check_all_matched(targets, targets.matched, names)
    if not adapted and config.target_modules:
        raise UsageError("--lora-exclude-modules takes away everything that --lora-target-modules names")
    for name in adapted:
        _check_ranks(name, targets.parts_of(name), config, base)


def _check_ranks(name: str, parts: tuple[int, ...], config: LoRAConfig, base: HFBase) -> None:
    """As ``layers.spec.spec_for`` does on the ranks."""
    shapes = base.shapes()
    projections, matrices = hf_names(name), [shapes[f"{projection}.weight"][-2:] for projection in hf_names(name)]
    split = config.layout == "split" and len(projections) > 1
    ranks = [config.rank_of(name, projections[part]) for part in parts]
    if not split and len(set(ranks)) > 1:
        raise UsageError(
            f"--lora-rank-pattern gives the projections of {name} ranks {sorted(set(ranks))}, but in layout fused "
            f"they share one A; use --lora-layout split, or name {name.rpartition('.')[2]} instead"
        )
    for part, rank in zip(parts, ranks):
        rows, columns = matrices[part][0] if split else sum(out for out, _ in matrices), matrices[part][1]
        if rank > min(rows, columns):
            what, most = projections[part] if split else name, min(rows, columns)
            raise UsageError(
                f"LoRA rank {rank} is larger than {what}, a {rows} x {columns} matrix; use at most {most}"
            )


def _adapted(config: LoRAConfig, base: HFBase) -> dict[str, tuple[int, float]]:
    """Hugging Face linear -> rank and scaling of its adapter."""
    targets, found = Targets(config.target_modules, config.exclude_modules), {}
    for name in dict.fromkeys(megatron_name(name)[0] for name in base.linears()):
        for part in targets.parts_of(name):
            names = (name, hf_names(name)[part])
            found[names[1]] = (config.rank_of(*names), config.scaling(*names))
    return found


def _difference(theirs: Mapping[str, tuple[int, float]], wanted: Mapping[str, tuple[int, float]]) -> str:
    """The first one, in words; empty if there is none."""
    for name in [*theirs, *wanted]:
        if name not in wanted:
            return f"{name} is adapted there, and not by the flags"
        if name not in theirs:
            return f"{name} is adapted by the flags, and not there"
        if theirs[name] != wanted[name]:
            there, here = (f"rank {rank} and scaling {scaling:g}" for rank, scaling in (theirs[name], wanted[name]))
            return f"{name} has {there} there, {here} by the flags"
    return ""
