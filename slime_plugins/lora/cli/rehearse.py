"""``slime-lora rehearse``: argument text; the run is in ``rehearsal.run``."""

from __future__ import annotations

import argparse
import sys
import warnings

from slime_plugins.lora.arguments import add_lora_arguments, validate_lora_args
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.rehearsal.settings import Settings
from slime_plugins.lora.rehearsal.task import REWARDS

NAME = "rehearse"
HELP = "LoRA RL from a Hugging Face checkpoint to a PEFT adapter: Ray, Megatron at any TP/PP/DP, CPU or GPU."
EPILOG = """\
Without --hf-checkpoint it trains a built-in 100k-parameter Qwen3 on a built-in task, a few minutes on 2 cores.
Left in --out: adapter/ (PEFT), metrics.jsonl, tensorboard/, reward.png, summary.json, serve/ (links), settings.json.
Exit code 1 if the base changed, Megatron's and transformers' logits differ, or the adapter is untrained.

examples:
  slime-lora rehearse
  slime-lora rehearse --tp 2 --sp --lora-target-modules q_proj v_proj --lora-layout split
  slime-lora rehearse --hf-checkpoint Qwen3-0.6B --prompt-data gsm8k.jsonl --input-key question --label-key answer \\
      --apply-chat-template --rm-type number --rollout-max-response-len 256 --steps 50
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb; names are slime's where slime has them."""
    defaults = Settings()
    _add_data_arguments(parser.add_argument_group("model and data"), defaults)
    _add_parallel_arguments(parser.add_argument_group("where it runs"), defaults)
    _add_training_arguments(parser.add_argument_group("training"), defaults)
    parser.add_argument("--out", metavar="DIR", default=defaults.out, help="results; replaces an earlier run's there")
    _add_checkpoint_arguments(parser.add_argument_group("checkpoints"))
    add_lora_arguments(parser)


def _add_checkpoint_arguments(group) -> None:
    add = group.add_argument
    add("--save", metavar="DIR", help="write sharded checkpoints, to resume from at any parallelism")
    add("--save-interval", type=int, metavar="N", help="steps between them (default: after the last step alone)")
    add("--load", metavar="DIR", help="resume from the latest one there, up to --steps in all")


def _add_data_arguments(group, defaults: Settings) -> None:
    add = group.add_argument
    add("--hf-checkpoint", metavar="DIR", help="Qwen2/2.5, Qwen3 or Llama 3 directory (default: a built-in one)")
    add("--prompt-data", metavar="FILE", help="jsonl of prompts and labels, with --hf-checkpoint")
    add("--input-key", default=defaults.input_key, metavar="KEY", help="of the prompt (default: %(default)s)")
    add("--label-key", default=defaults.label_key, metavar="KEY", help="of the answer (default: %(default)s)")
    add("--apply-chat-template", action="store_true", help="text prompts become a user message")
    add(
        "--rm-type",
        choices=tuple(REWARDS),
        default=defaults.rm_type,
        help="reward 1 if the response is the label (exact), or its last number is (number); default: %(default)s",
    )


def _add_parallel_arguments(group, defaults: Settings) -> None:
    add = group.add_argument
    add("--tp", type=int, default=defaults.tp, metavar="N", help="tensor-parallel ranks (default: %(default)s)")
    add("--sp", action="store_true", help="sequence parallelism")
    add("--pp", type=int, default=defaults.pp, metavar="N", help="pipeline stages (default: %(default)s)")
    add("--vpp", type=int, metavar="N", help="pipeline chunks per stage, with --pp (interleaved schedule)")
    add("--dp", type=int, default=defaults.dp, metavar="N", help="data-parallel ranks (default: %(default)s)")
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
    add("--steps", "--num-rollout", type=int, metavar="N", help="rollouts to train on (default: 70; 20 for your own)")
    add("--rollout-batch-size", type=int, metavar="N", help="prompts per step (default: 32; 8)")
    add("--n-samples-per-prompt", type=int, metavar="N", help="answers to each prompt (default: 16; 8)")
    add("--rollout-max-response-len", type=int, metavar="N", help="tokens (default: 4; 128)")
    add("--rollout-temperature", type=float, default=defaults.rollout_temperature, help="(default: %(default)s)")
    add(
        "--num-steps-per-rollout",
        type=int,
        default=defaults.num_steps_per_rollout,
        metavar="N",
        help="optimizer steps on each rollout (default: %(default)s)",
    )
    add("--micro-batch-size", type=int, metavar="N", help="samples per forward pass (default: as fits 4096 tokens)")
    add("--lr", type=float, help="constant; LoRA wants some 10x that of full training (default: 5e-3; 1e-4)")
    add("--weight-decay", type=float, default=defaults.weight_decay, help="(default: %(default)s)")
    add("--clip-grad", type=float, default=defaults.clip_grad, help="gradient norm (default: %(default)s)")
    add("--eps-clip", type=float, default=defaults.eps_clip, help="of the policy ratio (default: %(default)s)")
    add("--kl-loss-coef", type=float, default=defaults.kl_loss_coef, help="KL to the base (default: %(default)s)")
    add("--seed", type=int, default=defaults.seed, help="of adapters, sampling and order (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Train, export, compare. 0, or an exception."""
    args.use_lora = True
    if not args.lora_only_trainable:
        raise UsageError("--no-lora-only-trainable: a rehearsal trains and exports adapters alone")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        validate_lora_args(args)
    for warning in caught:
        print(f"slime-lora: warning: {warning.message}", file=sys.stderr)
    from slime_plugins.lora.rehearsal.cluster import terminate_as_interrupt
    from slime_plugins.lora.rehearsal.preflight import prepare

    with terminate_as_interrupt():
        settings = prepare(Settings.from_args(args))
        from slime_plugins.lora.rehearsal.run import rehearse

        rehearse(settings, debug=args.debug)
    return 0
