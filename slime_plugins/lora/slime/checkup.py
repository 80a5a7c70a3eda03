"""What can be said of a launch before it: versions, seams of the checkout, refusals for these arguments. No torch."""

from __future__ import annotations

import argparse
import ast
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from packaging.version import Version

from slime_plugins.lora.arguments import validate_lora_args
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.slime.hooks import launch as hooks
from slime_plugins.lora.slime.hooks.refusal import Launch
from slime_plugins.lora.slime.hooks.refusals import refused
from slime_plugins.lora.slime.hooks.serving import SERVING, transport
from slime_plugins.lora.slime.patch import checkout, plugin

KNOWN = {
    "torch": ("2.6", None),
    "megatron-core": ("0.16", None),
    "transformer-engine": ("2.10", "2.20.2"),
    "sglang": ("0.5.9", "0.5.23"),
    "ray": ("2.40", None),
    "transformers": ("4.51", None),
}
"""Distribution -> oldest and newest version that its code has been read or run at; None: none is known to break."""
SLIME_DEFAULTS = {
    "load": None, "ckpt_step": None, "finetune": False, "no_load_optim": False, "no_load_rng": False,
    "start_rollout_id": None, "debug_train_only": False, "use_critic": False, "colocate": False, "save_hf": None,
    "no_save_optim": False, "update_weight_transport": "nccl", "update_weight_mode": "full",
    "update_weight_disk_dir": None, "offload_rollout": None, "context_parallel_size": 1,
}  # fmt: skip
"""slime's own defaults of what the checks read without asking whether it is there."""


@dataclass(frozen=True)
class Finding:
    """One line."""

    state: str
    """``ok``, ``WRONG``, or ``unknown``: could not be checked here."""
    about: str
    text: str


def checkup(slime_dir: str | None, words: Sequence[str]) -> list[Finding]:
    """Everything that can be said here.

    Args:
        words: what ``train.py`` gets on its command line; empty to check none.
    Raises:
        UsageError: ``slime_dir`` is no slime checkout, or the words are no flags.
    """
    findings = [*_versions(), *_plugin()]
    if slime_dir:
        findings += _seams(slime_dir)
    else:
        findings.append(Finding("unknown", "checkout", "not given; --slime DIR checks it"))
    if words:
        findings += _arguments(words)
    else:
        findings.append(Finding("unknown", "arguments", "not given; -- ARGS checks them"))
    return findings


def _versions() -> Iterator[Finding]:
    for name, (oldest, newest) in KNOWN.items():
        span = f"{oldest} to {newest}" if newest else f"{oldest} or newer"
        try:
            found = Version(version(name))
        except PackageNotFoundError:
            yield Finding("unknown", "version", f"{name} is not installed here; known to work: {span}")
            continue
        if found < Version(oldest):
            text = f"{name} {found} is older than what is known to work ({span}); upgrade it"
            yield Finding("WRONG", "version", text)
        elif newest and found > Version(newest):
            yield Finding("unknown", "version", f"{name} {found} is newer than what has been tried ({span})")
        else:
            yield Finding("ok", "version", f"{name} {found}")


def _plugin() -> Iterator[Finding]:
    names = [point.name for point in entry_points(group="sglang.srt.plugins")]
    if "slime_lora" in names:
        yield Finding("ok", "plugin", "SGLang's server plugin is installed")
    else:
        yield Finding(
            "unknown",
            "plugin",
            "SGLang's server plugin is not installed here; --lora-sync adapter needs it where engines run: "
            "pip install slime-lora there (a linked checkout alone has no entry points)",
        )


def _seams(slime_dir: str) -> Iterator[Finding]:
    made = checkout.plan(slime_dir)
    for seam, problem in made.problems.items():
        yield Finding("WRONG", "checkout", f"seam {seam!r} is missing ({problem}); this slime version does not fit")
    if made.problems:
        return
    if not made.touched:
        yield Finding("WRONG", "checkout", f"not patched; slime-lora patch apply --slime {slime_dir}")
    elif not made.applied:
        yield Finding("WRONG", "checkout", f"edits of another version; slime-lora patch apply --slime {slime_dir}")
    elif (state := plugin.state(made.root)) not in ("link", "copy", "running"):
        text = f"slime_plugins/lora in it is {state}; slime-lora patch apply --slime {slime_dir}"
        yield Finding("WRONG", "checkout", text)
    else:
        yield Finding("ok", "checkout", f"every seam is there and edited: {made.root}")


def _arguments(words: Sequence[str]) -> Iterator[Finding]:
    args = launch_arguments(words)
    try:
        hooks.complete(args)
    except (UsageError, ValueError, OSError) as error:
        yield Finding("WRONG", "arguments", str(error))
        return
    if not args.use_lora:
        yield Finding("WRONG", "arguments", "no --use-lora among them: this would train the whole model")
    if args.use_lora and getattr(args, "num_layers", None) is None:
        yield Finding("unknown", "arguments", "no --num-layers and no base to read it from: targets are not checked")
        return
    wrong = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            validate_lora_args(args)
            if args.use_lora:
                wrong += [row.reason for row in refused(Launch(args))]
            if not wrong:
                hooks.validate_in_slime(args)
        except UsageError as error:
            wrong.append(str(error))
    try:
        Launch(args).models  # noqa: B018
    except ValueError as error:
        yield Finding("unknown", "models", f"{error}: whether the trained one is first is not checked")
    for text in dict.fromkeys(wrong):
        yield Finding("WRONG", "arguments", text)
    for text in dict.fromkeys(str(warning.message) for warning in warned):
        yield Finding("warning", "arguments", text)
    if not wrong and args.use_lora and Launch(args).adapter_sync:
        yield Finding("ok", "sync", f"adapters go to the engines as {transport(args)}")
    if not wrong:
        yield Finding("ok", "arguments", f"{len(words)} words, none refused")
    if args.use_lora and args.hf_checkpoint and not (Path(args.hf_checkpoint) / "config.json").is_file():
        yield Finding("unknown", "base", f"{args.hf_checkpoint} is not on this machine: its family is not checked")


def launch_arguments(words: Sequence[str]) -> argparse.Namespace:
    """slime's arguments as far as words alone tell: ours parsed as slime would, the others by their looks.

    Raises:
        UsageError: a word that belongs to no flag, or a value of ours that cannot be.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    hooks.flags(lambda: lambda given: given)()(parser)
    words = list(words)
    while words and not words[0].startswith("-"):
        words.pop(0)  # python3 train.py
    try:
        args, rest = parser.parse_known_args(words)
    except (argparse.ArgumentError, SystemExit) as error:
        raise UsageError(f"{error}") from None
    for name, value in {**SLIME_DEFAULTS, "hf_checkpoint": None}.items():
        setattr(args, name, value)
    for name, value in SERVING.items():
        setattr(args, f"sglang_{name}", value)
    for name, value in _by_looks(rest):
        setattr(args, name, value)
    if args.offload_rollout is None:
        args.offload_rollout = bool(args.colocate)
    args.no_save_optim = bool(args.no_save_optim)
    args.use_critic = bool(args.use_critic or getattr(args, "advantage_estimator", None) == "ppo")
    if getattr(args, "num_layers", None) is None:
        args.num_layers = _layers_of(args.hf_checkpoint)
    if args.load is None:
        args.load = getattr(args, "ref_load", None)
    return args


def _by_looks(words: list[str]) -> Iterator[tuple[str, Any]]:
    """``--a-flag 3`` -> ("a_flag", 3); without a value True, with several a list."""
    at = 0
    while at < len(words):
        flag = words[at]
        if not flag.startswith("--"):
            raise UsageError(f"{flag!r} belongs to no flag")
        name, equals, value = flag[2:].partition("=")
        values = [value] if equals else []
        at += 1
        while at < len(words) and not words[at].startswith("--"):
            values.append(words[at])
            at += 1
        read = [_value(text) for text in values]
        yield name.replace("-", "_"), read[0] if len(read) == 1 else read or True
        if name.startswith("no-") and not read:
            yield name[3:].replace("-", "_"), False


def _value(text: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, (int, float)) else text


def _layers_of(hf_checkpoint: str | None) -> int | None:
    try:
        config = json.loads((Path(hf_checkpoint or "") / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return (config | (config.get("text_config") or {})).get("num_hidden_layers")
