"""What ``--gkd-teacher`` names, looked at where a launch is: a word, an adapter, or weights of its own. No torch."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.objectives import TEACHERS
from slime_plugins.lora.slime.hooks.paths import ADAPTER_FILE, adapter_step_dir, step_dir

_SHAPE = (
    *("model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "hidden_act"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings"),
    *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
)
"""What a model computes by its config: the teacher runs in the student's place, with the student's settings."""


def teacher_weights(args: Namespace) -> str | None:
    """The directory of a teacher that is a whole model; None for one made of the base that trains."""
    teacher = args.gkd_teacher
    if teacher in TEACHERS or _holds_adapter(teacher) or _is_base(args, teacher):
        return None
    return teacher


def check_teacher(args: Namespace) -> None:
    """Make the base itself, named by its directory, the teacher ``base``. The files are on this machine.

    Raises:
        UsageError: there is no such teacher, or it is no model that fits into the student's place.
    """
    teacher = args.gkd_teacher
    if teacher in TEACHERS:
        return
    if not Path(teacher).is_dir():
        raise UsageError(
            f"--gkd-teacher {teacher}: expected {', '.join(TEACHERS)}, or the directory of a PEFT adapter, a "
            "checkpoint of adapters, or a model, and there is no such directory"
        )
    if _is_base(args, teacher):
        args.gkd_teacher = "base"
        return
    if _holds_adapter(teacher) or step_dir(teacher) is not None:
        return  # Megatron compares the shapes of its own checkpoints
    theirs, ours = _config(teacher), _config(args.hf_checkpoint)
    if theirs is None:
        raise UsageError(
            f"--gkd-teacher {teacher}: holds neither adapter_config.json nor config.json nor "
            "latest_checkpointed_iteration.txt, expected a PEFT adapter, a checkpoint of adapters, or a model"
        )
    if ours is not None:
        _check_fit(teacher, theirs, args.hf_checkpoint, ours)


def _holds_adapter(path: str) -> bool:
    files = [Path(path) / "adapter_config.json", Path(path) / ADAPTER_FILE]
    return any(file.is_file() for file in files) or adapter_step_dir(path) is not None


def _is_base(args: Namespace, path: str) -> bool:
    bases = [getattr(args, name, None) for name in ("hf_checkpoint", "ref_load", "load")]
    return any(Path(base).resolve() == Path(path).resolve() for base in bases if base)


def _config(path: str) -> dict[str, Any] | None:
    try:
        config = json.loads((Path(path) / "config.json").read_text())
    except (OSError, ValueError):
        return None
    config |= config.get("text_config") or {}
    rope = config.get("rope_parameters") or {}  # as transformers 5 writes it
    return {**config, **({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {})}


def _check_fit(teacher: str, theirs: dict[str, Any], base: str, ours: dict[str, Any]) -> None:
    if theirs.get("vocab_size") != ours.get("vocab_size"):
        raise UsageError(
            f"--gkd-teacher {teacher}: a vocabulary of {theirs.get('vocab_size')} and the student's of "
            f"{ours.get('vocab_size')} ({base}); expected the same tokens; take a teacher of the same family"
        )
    for name in _SHAPE:
        if name in theirs and name in ours and theirs[name] != ours[name]:
            raise UsageError(
                f"--gkd-teacher {teacher}: {name} is {theirs[name]}, the student's {ours[name]} ({base}); a teacher "
                "with weights of its own runs in the student's place and must have its shape; slime's own with "
                "--opd-type sglang takes others"
            )
    tokens = _tokens(teacher), _tokens(base)
    if None not in tokens and tokens[0] != tokens[1]:
        raise UsageError(
            f"--gkd-teacher {teacher}: its tokenizer.json gives other tokens their numbers than {base}'s; expected "
            "the same vocabulary; take a teacher of the same family"
        )


def _tokens(path: str) -> Any:
    """Token -> number, without those that were added; None where there is none to read."""
    try:
        return json.loads((Path(path) / "tokenizer.json").read_text())["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
