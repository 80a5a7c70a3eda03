"""``slime-lora convert-zero``: argument text and printing; the work is in ``zero``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from slime_plugins.lora.cli.arguments import add_names, check_out, place, positive

NAME = "convert-zero"
HELP = "Turn a DeepSpeed ZeRO-1/2/3 checkpoint of a PEFT model into a PEFT adapter."
EPILOG = """\
For runs whose adapter_model.safetensors is empty: the weights are in the DeepSpeed checkpoint beside it. DeepSpeed
is not needed. Nothing pickled is executed. The result is verified before it takes its place.

examples:
  slime-lora convert-zero out/checkpoint-500 --out adapter
  slime-lora convert-zero out/checkpoint-500 --tag global_step500 --out adapter --extra adapter-extra
  slime-lora convert-zero ckpt --lora-alpha 32 --base-model Qwen/Qwen3-4B --dtype bfloat16 --out adapter
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument(
        "checkpoint", type=place, metavar="CHECKPOINT_DIR", help="directory with `latest`, or of one tag"
    )
    parser.add_argument("--out", type=place, metavar="DIR", required=True, help="where to write the adapter")
    parser.add_argument("--tag", help="which save, for example global_step500 (default: the one `latest` names)")
    parser.add_argument("--adapter", metavar="NAME", help="which adapter, where the model has several")
    parser.add_argument(
        "--lora-alpha",
        type=positive,
        metavar="A",
        help="alpha of the run, where the checkpoint has no adapter_config.json; the scaling is alpha / rank",
    )
    parser.add_argument(
        "--base-model",
        type=place,
        metavar="NAME",
        help="base for the adapter's config; a local directory is also checked against",
    )
    add_names(parser)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the adapter (default: the fp32 masters as they are)",
    )
    parser.add_argument(
        "--extra",
        type=place,
        metavar="PATH",
        help="file or directory for what was trained beside the adapter: heads, embeddings (default: extra/ in --out)",
    )
    parser.add_argument("--force", action="store_true", help="replace an adapter that is already in --out")


def run(args: argparse.Namespace) -> int:
    """Convert, and print what was found; the last line is the path written."""
    import torch

    from slime_plugins.lora.cli.verify import table
    from slime_plugins.lora.errors import UsageError
    from slime_plugins.lora.zero.convert import convert_zero

    if os.path.isdir(args.out) and os.listdir(args.out) and not args.force:
        raise UsageError(f"--out {args.out} is not empty; give --force to replace an adapter in it")
    check_out("--out", args.out, {"CHECKPOINT_DIR": args.checkpoint, "--base-model": args.base_model})
    if args.extra is not None:
        extra = Path(args.extra)
        extra = extra if extra.suffix == ".safetensors" else extra / "extra.safetensors"
        if extra.exists() and not args.force:
            raise UsageError(f"--extra {extra} exists; give --force to replace it")
        if os.path.realpath(extra.parent) == os.path.realpath(args.out):
            raise UsageError(f"--extra {extra} lies in --out, where the adapter is written; name another place")
    done = convert_zero(
        args.checkpoint,
        args.out,
        tag=args.tag,
        adapter=args.adapter,
        alpha=args.lora_alpha,
        base_model=args.base_model,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        extra=args.extra,
        names=args.names,
    )
    print(f"{'checkpoint':<13} {done.checkpoint}: ZeRO stage {done.stage}, {done.world_size} ranks")
    print(f"{'weights':<13} {done.source}")
    print(f"{'config':<13} {done.config_from}")
    if done.others:
        print(f"{'also trained':<13} {len(done.others)} tensors beside the adapter, saved to {done.extra}:")
        for name in done.others:
            print(f"{'':<13} {name}")
    print(table(done.report))
    print(args.out)
    return 0
