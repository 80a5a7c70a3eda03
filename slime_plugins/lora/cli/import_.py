"""``slime-lora import``: a PEFT adapter to a sharded checkpoint. Argument text and printing only."""

from __future__ import annotations

import argparse

from slime_plugins.lora.arguments import lora_flags

NAME = "import"
HELP = "Turn a PEFT adapter into a sharded checkpoint, to train on at any parallelism."
EPILOG = """\
One plain process: no GPU, no process group, no Megatron. The checkpoint has no optimizer state; train on it with the
configuration printed. The last line printed is the path written.

examples:
  slime-lora import --adapter math-adapter --hf-checkpoint Qwen3-4B --out runs/math
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("--adapter", required=True, metavar="DIR", help="PEFT adapter, safetensors or .bin")
    parser.add_argument("--hf-checkpoint", required=True, metavar="DIR", help="the base that it belongs to")
    parser.add_argument("--out", required=True, metavar="DIR", help="a run's directory; the checkpoint is DIR/release")


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint; 0, or the error that ``cli.main`` prints."""
    from slime_plugins.lora.checkpoint.from_peft import import_checkpoint

    path, manifest = import_checkpoint(args.adapter, args.hf_checkpoint, args.out)
    print(f"{args.adapter}: adapters of {len(manifest.adapters)} linears")
    print(f"train on with: {lora_flags(manifest.config)}")
    print(path)
    return 0
