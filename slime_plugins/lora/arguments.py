"""The flags, and the checks that flags alone allow. Pure argparse; defaults come from ``LoRAConfig``."""

from __future__ import annotations

import argparse
import json
import warnings

from slime_plugins.lora.base.quantization import FORMS, check_flags
from slime_plugins.lora.config import DTYPES, INITS, LAYOUTS, LoRAConfig
from slime_plugins.lora.errors import UsageError

_DEFAULTS = LoRAConfig()

LOW_LR = 5e-6
"""Below this, a learning rate was meant for full training: LoRA wants about 10x (Schulman et al. 2025)."""


def add_lora_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group "LoRA" to a parser. Returns the parser."""
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
    _add_base_arguments(parser.add_argument_group("the base under LoRA", "what its frozen weights are stored as"))
    return parser


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
    LoRAConfig.from_args(args)
    check_flags(args)
    lr = getattr(args, "lr", None)
    if lr is not None and 0 < lr < LOW_LR:
        warnings.warn(
            f"--lr {lr:g} is a learning rate for full training; LoRA wants about 10x that (1e-5 to 1e-4)",
            stacklevel=2,
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
