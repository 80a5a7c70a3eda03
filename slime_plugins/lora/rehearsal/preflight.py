"""Everything that can be found wrong before a process starts.

Flags first, in milliseconds; then files; then prompts as tokens, which costs transformers' import.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slime_plugins.lora.arguments import base_args, lora_args
from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.base.decoder import HFBase
from slime_plugins.lora.base.quantization import check_checkpoint
from slime_plugins.lora.checkpoint import directory
from slime_plugins.lora.config import LoRAConfig
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.objectives import TEACHERS, make_objective, objective_class
from slime_plugins.lora.objectives.teacher_prompt import TeacherPrompt
from slime_plugins.lora.quant.codes import check_codes
from slime_plugins.lora.rehearsal import adapter_start, outputs
from slime_plugins.lora.rehearsal.builtin import builtin_checkpoint
from slime_plugins.lora.rehearsal.devices import default_tp
from slime_plugins.lora.rehearsal.encode import Encoder, to_look_at
from slime_plugins.lora.rehearsal.rewards import load_function
from slime_plugins.lora.rehearsal.settings import Settings, flag, resolve
from slime_plugins.lora.rehearsal.task import Keys, Prompt, read_prompts, recall_prompts

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_EVAL_SEED, _EVAL_PROMPTS = 1, 256


def prepare(given: Mapping[str, Any], progress: Callable[[str], None] = print) -> Settings:
    """Settings with every default filled in, the built-in base made if it is asked for, and all of it checked.

    Args:
        given: values of flags by destination, those of ``add_lora_arguments`` among them; what is absent takes its
            default, LoRA flags that of the adapter that ``load`` or ``lora_adapter_path`` names.
    Raises:
        UsageError: flags that cannot work, by themselves or with this base.
        ValueError, OSError: a file that is damaged or not supported.
    """
    flags = {name: value for name, value in given.items() if name in lora_args(LoRAConfig())}
    stored = {name: value for name, value in given.items() if name in base_args(None)}
    options = {name: value for name, value in given.items() if name not in {**flags, **stored}}
    _check_empty(given)
    if "tp" not in options:
        where = {name: options.get(name, getattr(Settings, name)) for name in ("device", "pp", "dp", "sp")}
        tp = default_tp(**where)
        options["tp"] = tp
        if tp == 1:
            progress("one GPU on this machine: --tp 1")
    seed = options.get("seed", Settings.seed)
    settings = resolve(options, adapter_start.config_of_flags(flags, seed))
    settings.check()
    _check_paths(settings)
    if settings.builtin:
        base_dir, prompt_data = builtin_checkpoint(progress)
        settings = dataclasses.replace(settings, hf_checkpoint=str(base_dir), prompt_data=str(prompt_data))
    base = HFBase.read(settings.hf_checkpoint)
    base.check_parallel(
        tp=settings.tp, pp=settings.pp, vpp=settings.vpp, ep=settings.ep, etp=settings.etp, sp=settings.sp
    )
    _check_installed(base)
    settings = dataclasses.replace(
        settings,
        lora=adapter_start.config_of_start(settings, flags, base, progress),
        base_quant=adapter_start.base_of_start(settings, stored, progress),
    )
    adapter_start.check_config(settings.lora, base)
    if settings.objective == "gkd" and settings.lora.trainable_token_indices:
        raise UsageError(
            "--objective gkd with trained vocabulary rows: the teacher is read through the student's output layer, "
            "which would be the frozen one; drop --trainable-token-indices"
        )
    adapter_start.kept_reference(settings)
    _check_codes(settings, base, progress)
    _check_task(settings, base, progress)
    return settings


def _check_installed(base: HFBase) -> None:
    """Has the transformers that is installed this family?"""
    if importlib.util.find_spec(base.family.module) is None:
        version = importlib.metadata.version("transformers")
        raise UsageError(
            f"{base.path}: {base.architecture} is not known to transformers {version}, which rolls out and "
            "computes its linear attention; get a newer one: pip install --upgrade transformers"
        )


def _check_codes(settings: Settings, base: HFBase, progress: Callable[[str], None]) -> None:
    """A base in 4 bits, asked for or as it is stored."""
    if (settings.base_quant is not None or base.coded) and (base.experts or base.linear):
        what = "stacked experts" if base.experts else "linear attention"
        told = "--lora-base-quant" if settings.base_quant is not None else "in NF4 codes"
        raise UsageError(
            f"{base.path} {told}: a rehearsal's ranks and rollouts would not store {what} alike, and would be of two "
            "bases; use a dense one, without --lora-base-quant"
        )
    if settings.base_quant is not None:
        shapes = base.shapes()
        linears = {name: shapes[f"{name}.weight"] for name in base.linears()}
        check_checkpoint(settings.base_quant, linears, tp=settings.tp)
        check_codes(settings.base_quant, BaseCheckpoint(base.path))
    elif base.coded:
        progress(
            f"note: {base.path} holds NF4 codes, and trains on their dequantised weights; --lora-base-quant nf4 keeps "
            "it in 4 bits"
        )


def _check_empty(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if isinstance(value, str) and (not value or "\0" in value):
            raise UsageError(f"{flag(name)} {value!r}: expected a name, not {'an empty one' if not value else 'this'}")


def _check_paths(settings: Settings) -> None:
    out = Path(settings.out)
    outputs.check_replaceable(out)
    for name in ("hf_checkpoint", "lora_adapter_path", "load"):
        path = getattr(settings, name)
        if path and out.resolve().is_relative_to(Path(path).resolve()):
            raise UsageError(f"--out {out}: lies in {flag(name)} {path}, which is read; name another directory")
    for name in ("hf_checkpoint", "lora_adapter_path", "load", "prompt_data", "eval_data", "val_data"):
        path = getattr(settings, name)
        if path and outputs.would_remove(out, Path(path)):
            raise UsageError(f"--out {out}: {flag(name)} {path} would be replaced by this run; name another directory")
    for name in ("prompt_data", "eval_data", "val_data"):
        path = getattr(settings, name)
        if path and not Path(path).is_file():
            raise UsageError(f"{flag(name)} {path}: no such file")
    teacher = settings.gkd_teacher
    if settings.objective == "gkd" and teacher not in TEACHERS:
        if not Path(teacher).is_dir():
            raise UsageError(
                f"--gkd-teacher {teacher}: expected {', '.join(TEACHERS)} or the directory of a PEFT adapter or "
                "checkpoint, and there is no such directory"
            )
        if outputs.would_remove(out, Path(teacher)):
            raise UsageError(f"--out {out}: --gkd-teacher {teacher} would be replaced; name another directory")
        if not (Path(teacher) / "adapter_config.json").is_file():
            directory.find(teacher)
    if settings.save is not None and Path(settings.save).exists() and not Path(settings.save).is_dir():
        raise UsageError(f"--save {settings.save}: is a file, expected a directory")
    if settings.use_wandb and importlib.util.find_spec("wandb") is None:
        raise UsageError("--use-wandb: the package wandb is not installed: pip install wandb")


def _check_task(settings: Settings, base: HFBase, progress: Callable[[str], None]) -> None:
    """Data, rewards, and prompts as tokens."""
    if not any((base.path / name).is_file() for name in _TOKENIZER_FILES):
        raise UsageError(f"{base.path}: no tokenizer files ({', '.join(_TOKENIZER_FILES)})")
    if settings.custom_rm_path is not None:
        load_function(settings.custom_rm_path)
    prompts, evals = train_prompts(settings), eval_prompts(settings)
    validations = to_look_at(validation_prompts(settings))
    if is_builtin(settings):
        return
    encoder = Encoder.read(
        base.path, apply_chat_template=settings.apply_chat_template, max_positions=base.max_positions
    )
    looked_at, room = to_look_at(prompts), settings.rollout_max_response_len
    objective = make_objective(settings.objective, settings)
    end = 0  # whichever it is, it is one
    shown = [(looked_at, [prompt.prompt for prompt in looked_at])]
    if objective.teacher_prompt_template is not None:
        shown.append((looked_at, teacher_prompts(objective.teacher_prompt_template, looked_at)))
    for of, texts in shown:
        if objective.rollouts:
            encoder.prompts(texts, room=room)
        if objective.given:
            encoder.pairs(texts, [prompt.response for prompt in of], end)
    if validations:
        encoder.pairs([prompt.prompt for prompt in validations], [prompt.response for prompt in validations], end)
    if evals:
        encoder.prompts([prompt.prompt for prompt in to_look_at(evals)], room=room)
    if encoder.template_unused and any(isinstance(prompt.prompt, str) for prompt in prompts):
        progress(
            "note: this tokenizer has a chat template, and text prompts are not put through it; "
            "chat models want --apply-chat-template"
        )


def is_builtin(settings: Settings) -> bool:
    """Of settings that ``prepare`` has returned: is it the built-in task?"""
    from slime_plugins.lora.rehearsal.builtin import is_builtin_file

    return is_builtin_file(settings.prompt_data)


def train_prompts(settings: Settings) -> list[Prompt]:
    """Raises ValueError naming the line that is wrong."""
    responses = objective_class(settings.objective).given
    response = (settings.response_key or settings.label_key) if responses else None
    return read_prompts(settings.prompt_data, _keys(settings, response))


def teacher_prompts(template: str, prompts: Sequence[Prompt]) -> list[str | list]:
    """What the teacher is shown for each."""
    teacher = TeacherPrompt(template)
    return [teacher.of(prompt.prompt, prompt.label, prompt.metadata) for prompt in prompts]


def eval_prompts(settings: Settings) -> list[Prompt]:
    """Held-out prompts; none, unless they are given or the task is the built-in one."""
    if settings.eval_data is not None:
        return read_prompts(settings.eval_data, _keys(settings, None))
    if not is_builtin(settings):
        return []
    seen = {prompt.prompt for prompt in train_prompts(settings)}
    rows = recall_prompts(2 * _EVAL_PROMPTS, _EVAL_SEED)
    unseen = [Prompt(row["input"], row["label"]) for row in rows if row["input"] not in seen]
    return unseen[:_EVAL_PROMPTS]


def validation_prompts(settings: Settings) -> list[Prompt]:
    """Prompts and responses to validate on; none, unless they are given, or asked for on the built-in task."""
    if settings.val_data is not None:
        return read_prompts(settings.val_data, _keys(settings, settings.response_key or settings.label_key))
    if settings.val_interval is None or not is_builtin(settings):
        return []
    return [dataclasses.replace(prompt, response=prompt.label or "") for prompt in eval_prompts(settings)]


def _keys(settings: Settings, response: str | None) -> Keys:
    return Keys(
        input=settings.input_key,
        label=settings.label_key,
        label_required=settings.custom_rm_path is None and (response is None or response == settings.label_key),
        response=response,
        metadata=settings.metadata_key,
    )
