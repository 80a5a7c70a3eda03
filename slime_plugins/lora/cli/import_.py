"""``slime-lora import``: a PEFT adapter to a sharded checkpoint. Argument text and printing only."""

from __future__ import annotations

import argparse

from slime_plugins.lora.arguments import lora_flags
from slime_plugins.lora.cli.arguments import add_names, check_out, place

NAME = "import"
HELP = "Turn a PEFT adapter into a sharded checkpoint, to train on at any parallelism."
EPILOG = """\
One plain process: no GPU, no process group, no Megatron. The whole base is read, once, and compared with what the
adapter notes of the one that it was made for. The checkpoint has no optimizer state; train on it with the
configuration printed. The last line printed is the path written.

examples:
  slime-lora import --adapter math-adapter --hf-checkpoint Qwen3-4B --out runs/math
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    for flag, what in (
        ("--adapter", "PEFT adapter, safetensors or .bin"),
        ("--hf-checkpoint", "the base that it belongs to"),
        ("--out", "a run's directory; the checkpoint is DIR/release"),
    ):
        parser.add_argument(flag, required=True, type=place, metavar="DIR", help=what)
    add_names(parser, reads=True)


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint; 0, or the error that ``cli.main`` prints."""
    from slime_plugins.lora.checkpoint.from_peft import import_checkpoint

    check_out("--out", args.out, {"--adapter": args.adapter, "--hf-checkpoint": args.hf_checkpoint})
    path, manifest, compared = import_checkpoint(args.adapter, args.hf_checkpoint, args.out, names=args.names)
    print(f"{args.adapter}: adapters of {len(manifest.adapters)} linears")
    print(f"base compared: {compared}")
    print(f"train on with: {lora_flags(manifest.config)}")
    print(path)
    return 0
