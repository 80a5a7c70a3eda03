"""``slime-lora plan --compare``: its flags and its printing; the arithmetic is in ``cost``."""

from __future__ import annotations

import argparse
import json

from slime_plugins.lora.cli.arguments import place, positive
from slime_plugins.lora.errors import UsageError

_DEFAULTS = {"new_tokens": 1024, "tokens": 8192, "gpu_memory": 80.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a comparison."""
    group = parser.add_argument_group("compare", "ways to train, beside each other, with activations")
    add = group.add_argument
    add("--compare", action="store_true", help="full training, LoRA r=8, 16, 32, QLoRA, and new tokens alone")
    add("--new-tokens", type=int, metavar="N", help="rows trained with the model frozen (default: 1024)")
    add(
        "--tokens",
        type=int,
        metavar="N",
        help="of a microbatch on a GPU, as slime's --max-tokens-per-gpu (with --compare: 8192)",
    )
    add("--gpu-memory", type=positive, metavar="GB", help="of one GPU, in 10^9 bytes (default: 80)")
    add(
        "--sequence-parallel",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="(default: with tensor parallelism, as in slime's scripts)",
    )
    add(
        "--local-kernels",
        action="store_true",
        default=None,
        help="as the rehearsal computes, one operation after the other, instead of flash attention and fused kernels",
    )
    add("--png", type=place, metavar="OUT", help="bars; needs matplotlib")


def check_numbers(args: argparse.Namespace) -> None:
    """Raise UsageError for counts that are none."""
    for name in ("new_tokens", "tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {value}; expected at least 1")


def refuse_without_compare(args: argparse.Namespace) -> None:
    """Raise UsageError for flags of a comparison where there is none."""
    for name in ("new_tokens", "gpu_memory", "sequence_parallel", "local_kernels", "png"):
        if getattr(args, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} given without --compare; add it, or drop this")
    if len(args.hf_checkpoint) > 1:
        raise UsageError(f"--hf-checkpoint names {len(args.hf_checkpoint)} models, which needs --compare")


def run(args: argparse.Namespace) -> int:
    """Print the comparison of every model; 0, or the error that ``cli.main`` prints."""
    from slime_plugins.lora.base.quantization import BaseQuant
    from slime_plugins.lora.config import LoRAConfig
    from slime_plugins.lora.cost import tables
    from slime_plugins.lora.cost.activations import Batch, Kernels
    from slime_plugins.lora.cost.compare import as_json, compare
    from slime_plugins.lora.cost.model import Model, Split

    if not args.lora_only_trainable:
        raise UsageError("--no-lora-only-trainable with --compare: its columns are fixed; drop one of them")
    given = {name: getattr(args, name) for name in _DEFAULTS if getattr(args, name) is not None}
    given = {**_DEFAULTS, **given}
    split = Split(tp=args.tp, pp=args.pp, dp=args.dp, ep=args.ep, etp=args.etp, sp=args.sequence_parallel)
    quant = BaseQuant.from_args(argparse.Namespace(**{**vars(args), "lora_base_quant": "nf4"}))
    theirs = not args.local_kernels
    kernels = Kernels(flash=theirs, te=theirs, fused=theirs)
    gpu_bytes = int(given["gpu_memory"] * 1e9)
    comparisons = [
        compare(
            Model.read(path),
            LoRAConfig.from_args(args),
            split,
            Batch(tokens=int(given["tokens"])),
            new_tokens=int(given["new_tokens"]),
            quant=quant,
            dtype=args.dtype,
            kernels=kernels,
        )
        for path in args.hf_checkpoint
    ]
    title = (
        f"tp {split.tp}{' + sp' if split.sp else ''}, pp {split.pp}, dp {split.dp}, ep {split.ep}, "
        f"etp {split.experts_tp}; {args.dtype}; {given['tokens']:,} tokens a microbatch; "
        f"GPU of {given['gpu_memory']:g} GB ({gpu_bytes / 2**30:.1f} GiB)"
    )
    if args.json:
        print(json.dumps({"gpu_bytes": gpu_bytes, "models": [as_json(one, gpu_bytes) for one in comparisons]}))
    else:
        print(title)
        for one in comparisons:
            model = one.model
            dense = "; no experts, --ep and --etp do not concern it" if split != model.without_experts(split) else ""
            sizes = f"{model.num_layers} layers, {model.parameters / 1e9:.2f}B{dense}"
            print(f"\n{model.name}: {model.architecture}, {sizes}")
            print(tables.table(one, gpu_bytes))
    if args.png:
        tables.draw(comparisons, args.png, gpu_bytes, title)
        if not args.json:
            print(args.png)
    return 0
