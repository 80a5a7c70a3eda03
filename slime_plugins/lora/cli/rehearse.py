"""``slime-lora rehearse``: argument text; the run is in ``rehearsal.run``."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slime_plugins.lora.arguments import (
    add_lora_arguments,
    add_new_tokens,
    base_args,
    lora_args,
    name_new_tokens,
    validate_lora_args,
)
from slime_plugins.lora.base.quantization import BaseQuant
from slime_plugins.lora.config import LoRAConfig
from slime_plugins.lora.control.arguments import add_plateau_arguments
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.objectives import OBJECTIVES
from slime_plugins.lora.rehearsal.rewards import RULES
from slime_plugins.lora.rehearsal.settings import DEFAULTS, Settings, flag, refuse_unread

NAME = "rehearse"
HELP = "LoRA training from a Hugging Face checkpoint to a PEFT adapter: Ray, Megatron at any TP/PP/DP, CPU or GPU."
EPILOG = """\
Without --hf-checkpoint it trains a built-in 100k-parameter Qwen3 on a built-in task, a few minutes on 2 cores.
Left in --out: adapter/ (PEFT), metrics.jsonl, samples.jsonl, tensorboard/, a curve, summary.json, serve/ (links),
settings.json. Exit code 1 if the base changed, Megatron's and transformers' logits differ, or the adapter is
untrained; 2 for flags that cannot work; 130 after Ctrl-C and 143 after SIGTERM, with the command that goes on.

examples:
  slime-lora rehearse
  slime-lora rehearse --tp 2 --sp --lora-target-modules q_proj v_proj --lora-layout split
  slime-lora rehearse --hf-checkpoint Qwen3-0.6B --prompt-data gsm8k.jsonl --input-key question --label-key answer \\
      --apply-chat-template --rm-type number --rollout-max-response-len 256 --steps 50
  slime-lora rehearse --objective sft --hf-checkpoint Qwen3-0.6B --prompt-data gsm8k.jsonl --input-key question \\
      --label-key answer --apply-chat-template
  slime-lora rehearse --config runs/rehearsal/settings.json --lr 1e-3 --out runs/second
"""
_NOT_SETTINGS = ("verb", "run", "debug", "config", "use_lora", "lora_only_trainable")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb; names are slime's where slime has them. Only what is given is in the namespace."""
    defaults = Settings()
    _add_data_arguments(parser.add_argument_group("model and data"), defaults)
    _add_reward_arguments(parser.add_argument_group("rewards"), defaults)
    _add_parallel_arguments(parser.add_argument_group("where it runs"), defaults)
    _add_training_arguments(parser.add_argument_group("training"), defaults)
    _add_control_arguments(parser.add_argument_group("validation, learning rate and stopping"))
    _add_distillation_arguments(parser.add_argument_group("distillation, --objective gkd"), defaults)
    _add_output_arguments(parser.add_argument_group("what it leaves"), defaults)
    _add_checkpoint_arguments(parser.add_argument_group("where it starts, and checkpoints"), defaults)
    # Adapters alone are trained here: flags that say whether there are any say nothing.
    add_lora_arguments(parser, hide=("use_lora", "lora_only_trainable"))
    add_new_tokens(parser)
    for action in parser._actions:
        if isinstance(action.help, str) and action.help != argparse.SUPPRESS:
            action.help = action.help.replace("%(default)s", str(action.default))
        action.default = argparse.SUPPRESS


def _add_data_arguments(group, defaults: Settings) -> None:
    add = group.add_argument
    add("--config", metavar="FILE", help="settings.json of an earlier run; flags that are given win over it")
    add(
        "--objective",
        choices=tuple(OBJECTIVES),
        default=defaults.objective,
        help="grpo: RL on sampled answers; sft: cross-entropy on given responses; gkd: a teacher's distribution "
        "(default: %(default)s)",
    )
    add(
        "--hf-checkpoint",
        metavar="DIR",
        help="Llama 3, Qwen2/2.5/3, Qwen3-MoE, Qwen3-Next or Qwen3.5 text directory (default: a built-in one)",
    )
    add("--prompt-data", metavar="FILE", help="jsonl of prompts and labels, with --hf-checkpoint")
    add("--input-key", default=defaults.input_key, metavar="KEY", help="of the prompt (default: %(default)s)")
    add("--label-key", default=defaults.label_key, metavar="KEY", help="of the answer (default: %(default)s)")
    add("--response-key", metavar="KEY", help="of the response that is given (default: that of --label-key)")
    add("--metadata-key", default=defaults.metadata_key, metavar="KEY", help="for --custom-rm-path (%(default)s)")
    add("--apply-chat-template", action="store_true", help="text prompts become a user message")
    add("--eval-data", metavar="FILE", help="jsonl of held-out prompts, answered greedily before and after training")
    add("--eval-interval", type=int, metavar="N", help="and every N steps")


def _add_reward_arguments(group, defaults: Settings) -> None:
    add = group.add_argument
    add(
        "--rm-type",
        choices=tuple(RULES),
        default=defaults.rm_type,
        help="reward 1 if the response is the label (exact), or its last number is (number); default: %(default)s",
    )
    add(
        "--custom-rm-path",
        metavar="MODULE.FUNCTION",
        help="a function of your own instead, slime's: (args, sample) -> number, async or not",
    )
    add("--show-samples", type=int, default=defaults.show_samples, metavar="N", help="print N answers of every step")


def _add_parallel_arguments(group, defaults: Settings) -> None:
    add = group.add_argument
    add("--tp", type=int, metavar="N", help=f"tensor-parallel ranks (default: {defaults.tp}; 1 with one GPU)")
    add("--sp", action="store_true", help="sequence parallelism")
    add("--pp", type=int, default=defaults.pp, metavar="N", help="pipeline stages (default: %(default)s)")
    add("--vpp", type=int, metavar="N", help="pipeline chunks per stage, with --pp (interleaved schedule)")
    add("--dp", type=int, default=defaults.dp, metavar="N", help="data-parallel ranks (default: %(default)s)")
    add(
        "--ep",
        type=int,
        default=defaults.ep,
        metavar="N",
        help="of these and --tp's, expert-parallel ranks (default: 1)",
    )
    add("--etp", type=int, metavar="N", help="expert-tensor-parallel ranks (default: those of --tp)")
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default=defaults.device,
        help="auto: CUDA with NCCL where there is a GPU per rank, else gloo on the CPU",
    )
    add("--dtype", choices=("float32", "bfloat16"), default=defaults.dtype, help="of the base (default: %(default)s)")
    add("--recompute-granularity", choices=("full", "selective"), help="activation recompute (default: none)")


def _add_training_arguments(group, defaults: Settings) -> None:
    add = group.add_argument
    add("--steps", "--num-rollout", type=int, metavar="N", help=f"batches to train on ({_by_task('steps')})")
    add("--rollout-batch-size", type=int, metavar="N", help=f"prompts per step ({_by_task('rollout_batch_size')})")
    add("--n-samples-per-prompt", type=int, metavar="N", help=f"answers to each ({_by_task('n_samples_per_prompt')})")
    add(
        "--rollout-max-response-len",
        type=int,
        metavar="N",
        help=f"tokens of an answer ({_by_task('rollout_max_response_len')})",
    )
    add("--rollout-temperature", type=float, default=defaults.rollout_temperature, help="(default: %(default)s)")
    add(
        "--num-steps-per-rollout",
        type=int,
        metavar="N",
        help=f"optimizer steps on each batch (default: grpo {defaults.num_steps_per_rollout}, sft 1)",
    )
    add("--micro-batch-size", type=int, metavar="N", help="samples per forward pass (default: as fits 4096 tokens)")
    add("--lr", type=float, help=f"constant; LoRA wants some 10x that of full training ({_by_task('lr')})")
    add("--weight-decay", type=float, default=defaults.weight_decay, help="(default: %(default)s)")
    add("--clip-grad", type=float, default=defaults.clip_grad, help="gradient norm (default: %(default)s)")
    add("--eps-clip", type=float, default=defaults.eps_clip, help="of the policy ratio (default: %(default)s)")
    add("--kl-loss-coef", type=float, default=defaults.kl_loss_coef, help="KL to the reference (default: %(default)s)")
    add("--seed", type=int, default=defaults.seed, help="of adapters, sampling and order (default: %(default)s)")


def _add_control_arguments(group) -> None:
    group.add_argument("--val-data", metavar="FILE", help="jsonl of prompts and responses, for val_loss (sft)")
    group.add_argument("--val-interval", type=int, metavar="N", help="steps between validations")
    add_plateau_arguments(group)


def _add_distillation_arguments(group, defaults: Settings) -> None:
    add = group.add_argument
    add(
        "--gkd-teacher",
        default=defaults.gkd_teacher,
        metavar="base|live|ema|DIR",
        help="the base, the student itself, the average of its adapters, or a PEFT adapter or checkpoint "
        "(default: %(default)s)",
    )
    add(
        "--gkd-teacher-prompt-template",
        metavar="TEXT",
        help="what the teacher is shown: {prompt}, {label}, {metadata[KEY]} (default: the student's prompt; "
        "the built-in task has one)",
    )
    add(
        "--gkd-beta",
        type=float,
        default=defaults.gkd_beta,
        metavar="B",
        help="0: KL(teacher || student), 1: KL(student || teacher), between: Jensen-Shannon (default: %(default)s)",
    )
    add(
        "--gkd-lmbda",
        type=float,
        default=defaults.gkd_lmbda,
        metavar="L",
        help="share of steps on the student's own samples, not on given responses (default: %(default)s)",
    )
    add(
        "--gkd-temperature",
        type=float,
        default=defaults.gkd_temperature,
        metavar="T",
        help="of both in the divergence, not of sampling (default: %(default)s)",
    )
    add(
        "--sft-alpha",
        type=float,
        default=defaults.sft_alpha,
        metavar="A",
        help="weight of the cross-entropy on given responses (default: %(default)s)",
    )
    add(
        "--gkd-ema-decay",
        type=float,
        metavar="D",
        help="of --gkd-teacher ema, per optimizer step (default: 0.99)",
    )
    add(
        "--gkd-chunk-size",
        type=int,
        default=defaults.gkd_chunk_size,
        metavar="N",
        help="tokens whose distributions are compared at a time (default: %(default)s)",
    )


def _by_task(name: str) -> str:
    """The defaults in words: of the built-in task and of one's own data, for every objective where they differ."""
    words = [f"{builtin[name]} built-in, {own[name]} own data" for builtin, own in DEFAULTS.values()]
    if len(set(words)) == 1:
        return f"default: {words[0]}"
    return "default: " + "; ".join(f"{objective} {text}" for objective, text in zip(DEFAULTS, words))


def _add_output_arguments(group, defaults: Settings) -> None:
    add = group.add_argument
    add("--out", metavar="DIR", default=defaults.out, help="results; replaces an earlier run's there (%(default)s)")
    add("--use-wandb", action="store_true", help="log to Weights & Biases beside TensorBoard")
    add("--wandb-mode", choices=("online", "offline", "disabled"), help="(default: wandb's, online)")
    for name in ("project", "group", "team", "dir", "host", "key"):
        add(f"--wandb-{name}", metavar=name.upper(), help="as in slime")


def _add_checkpoint_arguments(group, defaults: Settings) -> None:
    add = group.add_argument
    add("--save", metavar="DIR", help="write sharded checkpoints, to resume from at any parallelism")
    add("--save-interval", type=int, metavar="N", help="steps between them (default: after the last step alone)")
    add("--load", metavar="DIR", help="resume from the latest one there, up to --steps in all; brings its LoRA flags")
    add(
        "--lora-adapter-path",
        metavar="DIR",
        help="start from the adapter of a PEFT directory or a checkpoint, at step 1; brings its LoRA flags",
    )
    add(
        "--lora-ref",
        choices=("base", "start"),
        default=defaults.lora_ref,
        help="what the KL is measured from: the base (default), or start, the adapter of --lora-adapter-path, kept in "
        "--save/reference",
    )


def run(args: argparse.Namespace) -> int:
    """Train, export, compare. 0, or an exception."""
    if not getattr(args, "lora_only_trainable", True):
        raise UsageError("--no-lora-only-trainable: a rehearsal trains and exports adapters alone")
    given = {name: value for name, value in vars(args).items() if name not in _NOT_SETTINGS}
    values = {**_read_config(args.config), **given} if "config" in args else given
    values = _with_ids(values)
    refuse_unread(values.get("objective", Settings.objective), given)
    from slime_plugins.lora.rehearsal.cluster import terminate_as_interrupt
    from slime_plugins.lora.rehearsal.preflight import prepare

    with terminate_as_interrupt():
        settings = prepare(values)
        _warn(settings)
        from slime_plugins.lora.rehearsal.run import rehearse

        rehearse(settings, debug=getattr(args, "debug", False))
    return 0


def _with_ids(values: dict[str, Any]) -> dict[str, Any]:
    """``--new-tokens`` as the ids that it stands for."""
    named = argparse.Namespace(**{"trainable_token_indices": [], "hf_checkpoint": None, "new_tokens": None, **values})
    if named.new_tokens is None:
        return values
    if named.hf_checkpoint is None:
        from slime_plugins.lora.base.tokens import read_tokens
        from slime_plugins.lora.rehearsal.builtin import task_in_new_tokens

        builtin, _ = DEFAULTS[values.get("objective", Settings.objective)]
        values = {**builtin, **task_in_new_tokens(read_tokens(named.new_tokens)), **values}
        named.hf_checkpoint = values["hf_checkpoint"]
    name_new_tokens(named)
    ids = {"trainable_token_indices": named.trainable_token_indices}
    return {name: value for name, value in values.items() if name != "new_tokens"} | ids


def _warn(settings: Settings) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        flags = lora_args(settings.lora) | base_args(settings.base_quant)
        validate_lora_args(argparse.Namespace(**flags, use_lora=True, lora_only_trainable=True, lr=settings.lr))
    for warning in caught:
        print(f"slime-lora: warning: {warning.message}", file=sys.stderr)


def _read_config(path: str) -> dict[str, Any]:
    """Values by destination of a ``settings.json``, read as flags are, so that nothing else comes through.

    Raises:
        UsageError: there is no such file, or it holds what no flag would take.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--config {path}: not JSON: {error}") from None
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from None
    if not isinstance(content, dict):
        raise UsageError(f"--config {path}: expected a JSON object of settings, found {type(content).__name__}")
    parser = argparse.ArgumentParser(exit_on_error=False, add_help=False, allow_abbrev=False)
    add_arguments(parser)
    lora, quant = content.pop("lora", {}), content.pop("base_quant", None)
    unknown = [name for name in content if flag(name) not in parser._option_string_actions]
    if unknown:
        raise UsageError(f"--config {path}: {unknown[0]!r} is no setting of a rehearsal")
    try:
        words = [word for name, value in content.items() for word in _words(name, value, parser)]
        given = vars(parser.parse_args(words))
        if lora:
            config = LoRAConfig(**lora)
            given |= lora_args(config)
        if quant is not None:
            given |= base_args(BaseQuant.read(quant, "base_quant"))
    except (argparse.ArgumentError, TypeError, AttributeError, UsageError, ValueError) as error:
        raise UsageError(f"--config {path}: {error}") from None
    return _without_builtin(given)


def _words(name: str, value: Any, parser: argparse.ArgumentParser) -> list[str]:
    if value is None:
        return []
    if value is False:
        no = flag(f"no_{name}")
        return [no] if no in parser._option_string_actions else []
    if value is True:
        return [flag(name)]
    if not isinstance(value, (str, int, float)):
        raise UsageError(f"{name} is {value!r}, expected text or a number")
    return [f"{flag(name)}={value}"]


def _without_builtin(given: Mapping[str, Any]) -> dict[str, Any]:
    """Without the paths of the built-in base and task: each machine makes its own."""
    from slime_plugins.lora.rehearsal.builtin import is_builtin_file

    builtin = ("hf_checkpoint", "prompt_data") if is_builtin_file(given.get("prompt_data", "")) else ()
    return {name: value for name, value in given.items() if name not in builtin}
