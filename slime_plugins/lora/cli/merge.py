"""``slime-lora merge``: a PEFT adapter into its base. Argument text and printing only."""

from __future__ import annotations

import argparse

from slime_plugins.lora.cli.arguments import check_out, lost, place

NAME = "merge"
HELP = "Merge a PEFT adapter into its base: a full model, for instance to train a new adapter on."
EPILOG = """\
One plain process: no GPU, no process group, no Megatron. Every matrix is W + scaling * B A in float32, rounded once
to the base's dtype, as PEFT's merge_and_unload of a float32 model is; the rest of the base is copied byte for byte.
The whole base is read, once, and compared with what the adapter notes of the one that it was made for. In memory is
one matrix at a time. DIR appears when all of it is on disk, or not at all. The last line printed is the path written.

examples:
  slime-lora merge sft-adapter --hf-checkpoint Qwen3-4B --out Qwen3-4B-sft
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument(
        "adapter", type=place, metavar="ADAPTER_DIR", help="directory with adapter_config.json and the weights"
    )
    parser.add_argument("--hf-checkpoint", required=True, type=place, metavar="DIR", help="the base it was trained on")
    parser.add_argument("--out", required=True, type=place, metavar="DIR", help="the merged model: a new directory")


def run(args: argparse.Namespace) -> int:
    """Write the model; 0, or the error that ``cli.main`` prints."""
    from slime_plugins.lora.base.checkpoint import BaseCheckpoint
    from slime_plugins.lora.peft.directory import open_tensors
    from slime_plugins.lora.peft.merge import merge_adapter
    from slime_plugins.lora.quant.dequantize import as_trained

    check_out("--out", args.out, {"ADAPTER_DIR": args.adapter, "--hf-checkpoint": args.hf_checkpoint})
    base, quant = BaseCheckpoint(args.hf_checkpoint), open_tensors(args.adapter).base_quant
    onto = as_trained(base, quant)
    if quant is not None and onto:
        print(f"merging onto the {quant.form} base that it was trained on, dequantised")
    merged = merge_adapter(args.adapter, base, args.out, **onto)
    print(f"{args.adapter}: {merged.modules} matrices merged")
    print(f"base compared: {merged.compared}")
    print(lost(merged.rounding))
    print(args.out)
    return 0
