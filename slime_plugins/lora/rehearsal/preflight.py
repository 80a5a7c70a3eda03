"""Everything that can be found wrong before a process starts, without torch: in milliseconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from slime_plugins.lora.base.decoder import HFBase
from slime_plugins.lora.base.quantization import check_checkpoint
from slime_plugins.lora.checkpoint import directory
from slime_plugins.lora.checkpoint.manifest import Manifest
from slime_plugins.lora.config import LoRAConfig
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.names import megatron_name
from slime_plugins.lora.rehearsal.builtin import builtin_checkpoint
from slime_plugins.lora.rehearsal.outputs import check_replaceable
from slime_plugins.lora.rehearsal.settings import Settings
from slime_plugins.lora.rehearsal.task import read_prompts
from slime_plugins.lora.targets import Targets, check_all_matched

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def prepare(settings: Settings, progress: Callable[[str], None] = print) -> Settings:
    """Settings with every default filled in, the built-in base made if it is asked for, and all of it checked.

    Raises:
        UsageError: flags that cannot work, by themselves or with this base.
        ValueError, OSError: a file that is damaged or not supported.
    """
    settings = settings.resolved()
    settings.check()
    check_replaceable(Path(settings.out))
    if settings.builtin:
        base, prompt_data = builtin_checkpoint(progress)
        settings = dataclasses.replace(settings, hf_checkpoint=str(base), prompt_data=str(prompt_data))
    base = HFBase.read(settings.hf_checkpoint)
    base.check_parallel(tp=settings.tp, pp=settings.pp, vpp=settings.vpp)
    if not any((base.path / name).is_file() for name in _TOKENIZER_FILES):
        raise UsageError(f"{base.path}: no tokenizer files ({', '.join(_TOKENIZER_FILES)})")
    if not Path(settings.prompt_data).is_file():
        raise UsageError(f"--prompt-data {settings.prompt_data}: no such file")
    read_prompts(settings.prompt_data, settings.input_key, settings.label_key)
    _check_targets(settings.lora, base.linears())
    if settings.base_quant is not None:
        shapes = base.shapes()
        linears = {name: shapes[f"{name}.weight"] for name in base.linears()}
        check_checkpoint(settings.base_quant, linears, tp=settings.tp)
    if settings.load is not None:
        step = Manifest.read(directory.find(settings.load)).step
        if step is None or step >= settings.steps:
            raise UsageError(
                f"--load {settings.load}: it is at step {step}; --steps {settings.steps} leaves none to do"
            )
    return settings


def _check_targets(lora: LoRAConfig, hf_linears: list[str]) -> None:
    targets = Targets(lora.target_modules, lora.exclude_modules)
    names = dict.fromkeys(megatron_name(name)[0] for name in hf_linears)
    adapted = [name for name in names if targets.parts_of(name)]
    check_all_matched(targets, targets.matched, names)
    if not adapted:
        raise UsageError("--lora-exclude-modules takes away everything that --lora-target-modules names")
