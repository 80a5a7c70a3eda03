"""The flags, and the checks that flags alone allow. Pure argparse; defaults come from ``LoRAConfig``."""

from __future__ import annotations

import argparse
import json
import shlex
import warnings
from collections.abc import Collection
from typing import Any

from slime_plugins.lora.base.quantization import FORMS, BaseQuant, check_flags
from slime_plugins.lora.config import DTYPES, INITS, LAYOUTS, LINEARS, LoRAConfig, as_ranges
from slime_plugins.lora.errors import UsageError

_DEFAULTS = LoRAConfig()

LR_OVER_FULL = 10
"""The best learning rate of LoRA over that of full training, at any rank and model size, with scaling alpha / rank.

Schulman et al. 2025, "LoRA Without Regret" (thinkingmachines.ai/blog/lora), measured at alpha 32, for supervised
training and RL alike; about 15 in runs of some hundred steps. Tinker's cookbook has the same constant
(``hyperparam_utils.get_lora_lr_over_full_finetune_lr``).
"""
FULL_LR = 1e-6
"""Of slime's own RL scripts, which train the whole model."""
LOW_LR = FULL_LR * LR_OVER_FULL / 2
"""Below this, a learning rate was meant for full training."""


def add_lora_arguments(parser: argparse.ArgumentParser, *, hide: Collection[str] = ()) -> argparse.ArgumentParser:
    """Add the group "LoRA" to a parser. Returns the parser.

    Args:
        hide: destinations left out of the help, of flags that say nothing there; they are accepted all the same.
    """
    group = parser.add_argument_group("LoRA", "low-rank adapters on frozen Megatron linears")
    add = group.add_argument
    add("--use-lora", action="store_true", help="train LoRA adapters instead of the whole model")
    add("--lora-r", "--lora-rank", type=int, default=_DEFAULTS.rank, help="rank (default: %(default)s)")
    add("--lora-alpha", type=float, default=_DEFAULTS.alpha, help="scaling is alpha / rank (default: %(default)s)")
    add("--lora-dropout", type=float, default=_DEFAULTS.dropout, help="on the input of A (default: %(default)s)")
    add(
        "--lora-target-modules",
        nargs="+",
        default=list(_DEFAULTS.target_modules),
        metavar="NAME",
        help="Megatron names (linear_qkv), Hugging Face names (q_proj), all-linear, or wildcards on full names "
        "(*.layers.0.*.linear_qkv); separated by spaces or commas (default: all-linear)",
    )
    add(
        "--lora-only-trainable",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="freeze the base (default); --no-lora-only-trainable trains it too",
    )
    add("--lora-exclude-modules", nargs="+", default=[], metavar="NAME", help="taken away from the targets")
    add(
        "--lora-layout",
        choices=LAYOUTS,
        default=_DEFAULTS.layout,
        help="fused: one A per Megatron linear; split: one A per Hugging Face projection (default: %(default)s)",
    )
    add("--lora-rslora", action="store_true", help="scaling is alpha / sqrt(rank)")
    add("--lora-init", choices=INITS, default=_DEFAULTS.init, help="how A starts; B is zero (default: %(default)s)")
    add("--lora-dtype", choices=DTYPES, default=None, help="of the adapter (default: the base weight's)")
    add("--lora-rank-pattern", type=_json_object, default={}, metavar="JSON", help="e.g. '{\"linear_fc1\": 32}'")
    add("--lora-alpha-pattern", type=_json_object, default={}, metavar="JSON", help="e.g. '{\"linear_fc1\": 64}'")
    add(
        "--lora-plus-ratio",
        type=float,
        default=1.0,
        metavar="X",
        help="LoRA+: B's learning rate is X times A's, which is --lr (arXiv:2402.12354; default: %(default)s)",
    )
    add(
        "--lora-linears",
        choices=LINEARS,
        default="auto",
        help="fused: a linear and its adapter as one autograd function; taps: two around the linear; auto: the former "
        "wherever nothing forbids it, and the report says what does (default: auto)",
    )
    _add_row_arguments(parser.add_argument_group("vocabulary rows", "of the embedding and the output layer"))
    _add_base_arguments(parser.add_argument_group("the base under LoRA", "what its frozen weights are stored as"))
    for action in parser._actions:
        if action.dest in hide:
            action.help = argparse.SUPPRESS
    return parser


def _add_row_arguments(group) -> None:
    add = group.add_argument
    add(
        "--trainable-token-indices",
        nargs="+",
        default=[],
        metavar="ID[-ID]",
        help="train the rows of these vocabulary ids beside the adapters: 151665-152432, or several",
    )
    add("--freeze-llm", action="store_true", help="those rows alone, no adapters on linears")


def add_new_tokens(group) -> None:
    """``--new-tokens``, for who knows the base's directory: ``name_new_tokens``."""
    group.add_argument(
        "--new-tokens",
        metavar="FILE",
        help="the same, by name: one token a line, known to the tokenizer of --hf-checkpoint (slime-lora add-tokens)",
    )


def name_new_tokens(args: argparse.Namespace) -> None:
    """Set ``trainable_token_indices`` to the ids of ``new_tokens``, by the tokenizer of ``hf_checkpoint``.

    Raises:
        UsageError: both are given, or a token is not one of the tokenizer's.
        ValueError, OSError: a file that cannot be read.
    """
    file = getattr(args, "new_tokens", None)
    if file is None:
        return
    if args.trainable_token_indices:
        raise UsageError("--new-tokens and --trainable-token-indices name the same rows; give one of them")
    if not getattr(args, "hf_checkpoint", None):
        raise UsageError("--new-tokens needs --hf-checkpoint, whose tokenizer knows the tokens' ids")
    from slime_plugins.lora.base.tokens import read_tokens, token_ids

    ids = token_ids(args.hf_checkpoint, [token.text for token in read_tokens(file)])
    args.trainable_token_indices, args.new_tokens = as_ranges(sorted(ids)), None


def lora_args(config: LoRAConfig) -> dict[str, Any]:
    """Destination -> value of the flags that give this config; ``LoRAConfig.from_args`` read backwards."""
    return {
        "lora_r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "lora_target_modules": list(config.target_modules or _DEFAULTS.target_modules),
        "lora_exclude_modules": list(config.exclude_modules),
        "lora_layout": config.layout,
        "lora_rslora": config.use_rslora,
        "lora_init": config.init,
        "lora_dtype": config.dtype,
        "lora_rank_pattern": dict(config.rank_pattern),
        "lora_alpha_pattern": dict(config.alpha_pattern),
        "trainable_token_indices": as_ranges(config.trainable_token_indices),
        "freeze_llm": not config.target_modules,
    }


def lora_flags(config: LoRAConfig) -> str:
    """Command line flags that give this config, for a shell: what an adapter is, and what else is not the default."""
    always = ("lora_r", "lora_alpha", "lora_layout", "lora_target_modules")
    defaults, words = lora_args(_DEFAULTS), []
    for name, value in lora_args(config).items():
        if name not in always and value == defaults[name]:
            continue
        words.append("--" + name.replace("_", "-"))
        if isinstance(value, dict):
            words.append(json.dumps(value))
        elif isinstance(value, list):
            words.extend(value)
        elif value is not True:
            words.append(str(int(value)) if isinstance(value, float) and value.is_integer() else str(value))
    return shlex.join(words)


def _add_base_arguments(group) -> None:
    add = group.add_argument
    add(
        "--lora-base-quant",
        choices=("none", *FORMS),
        default="none",
        help="nf4: the weights of decoder linears in 4 bits, the bits of bitsandbytes (default: %(default)s)",
    )
    add("--load-in-4bit", dest="lora_base_quant", action="store_const", const="nf4", help="the same as nf4")
    add_quant_details(group)


def add_quant_details(group) -> None:
    """The flags of ``base.quantization.BaseQuant`` but its form."""
    add = group.add_argument
    add(
        *("--lora-base-double-quant", "--bnb-4bit-use-double-quant"),
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the codes' scales in 8 bits: 0.516 bytes a weight instead of 0.5625 (default)",
    )
    add(
        "--lora-base-quant-exclude",
        nargs="+",
        default=[],
        metavar="NAME",
        help="linears that stay dense, named as --lora-target-modules names them",
    )


def base_args(quant: BaseQuant | None) -> dict[str, Any]:
    """Destination -> value of the flags that give this base; ``BaseQuant.from_args`` read backwards."""
    form = "none" if quant is None else quant.form
    quant = quant or BaseQuant()
    return {
        "lora_base_quant": form,
        "lora_base_double_quant": quant.double_quant,
        "lora_base_quant_exclude": list(quant.exclude),
    }


def base_flags(quant: BaseQuant | None) -> str:
    """The same as command line flags, for a shell."""
    if quant is None:
        return "--lora-base-quant none"
    words = ["--lora-base-quant", quant.form]
    words += [] if quant.double_quant else ["--no-lora-base-double-quant"]
    words += ["--lora-base-quant-exclude", *quant.exclude] if quant.exclude else []
    return shlex.join(words)


def validate_lora_args(args: argparse.Namespace) -> None:
    """Check the LoRA flags against each other and the trainer's.

    Raises:
        UsageError: values or combinations that cannot work, and LoRA flags without ``--use-lora``.
    Warns:
        UserWarning: a learning rate that full training would use.
    """
    if not args.use_lora:
        given = sorted(name for name in _changed_flags(args))
        if given:
            raise UsageError(f"{', '.join(given)} given without --use-lora; add --use-lora, or drop them")
        return
    config = LoRAConfig.from_args(args)
    if config.trainable_token_indices and not args.lora_only_trainable:
        raise UsageError("--trainable-token-indices with --no-lora-only-trainable: then every row trains; drop one")
    check_flags(args)
    check_lora_plus(getattr(args, "lora_plus_ratio", 1.0))
    lr = getattr(args, "lr", None)
    if lr is not None and 0 < lr < LOW_LR:
        warnings.warn(
            f"--lr {lr:g} is a learning rate for full training; LoRA wants about {LR_OVER_FULL}x that (1e-5 to 1e-4; "
            "Schulman et al. 2025)",
            stacklevel=2,
        )


def check_lora_plus(ratio: float) -> None:
    """Raise UsageError for a ratio that LoRA+ does not have."""
    if not 1 <= ratio < 2**31:
        raise UsageError(
            f"--lora-plus-ratio {ratio:g}: expected at least 1, which is plain LoRA (the paper's own choice is 16); "
            "a slower B than A learns less, lower --lr instead"
        )


def _changed_flags(args: argparse.Namespace) -> list[str]:
    parser = add_lora_arguments(argparse.ArgumentParser())
    defaults = vars(parser.parse_args([]))
    return [
        "--" + name.replace("_", "-")
        for name, default in defaults.items()
        if name != "use_lora" and getattr(args, name, default) != default
    ]


def _json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object of name: number, got {text}")
    return value
