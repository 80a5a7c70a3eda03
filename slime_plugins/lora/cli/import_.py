"""``slime-lora import``: a PEFT adapter to a sharded checkpoint. Argument text and printing only."""

from __future__ import annotations

import argparse
import json
import shlex

from slime_plugins.lora.cli.arguments import check_out, place

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


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint; 0, or the error that ``cli.main`` prints."""
    from slime_plugins.lora.checkpoint.from_peft import import_checkpoint

    check_out("--out", args.out, {"--adapter": args.adapter, "--hf-checkpoint": args.hf_checkpoint})
    path, manifest, compared = import_checkpoint(args.adapter, args.hf_checkpoint, args.out)
    print(f"{args.adapter}: adapters of {len(manifest.adapters)} linears")
    print(f"base compared: {compared}")
    print(f"train on with: {_flags(manifest.config)}")
    print(path)
    return 0


def _flags(config) -> str:
    """The flags of a run whose adapters these are."""
    flags = ["--lora-r", config.rank, "--lora-alpha", f"{config.alpha:g}", "--lora-layout", config.layout]
    flags += ["--lora-target-modules", *config.target_modules] + ["--lora-rslora"] * config.use_rslora
    for name in ("rank_pattern", "alpha_pattern"):
        if getattr(config, name):
            flags += [f"--lora-{name.replace('_', '-')}", json.dumps(getattr(config, name))]
    return shlex.join(str(flag) for flag in flags)
