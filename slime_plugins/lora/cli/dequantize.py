"""``slime-lora dequantize``: argument text; the work is in ``quant.dequantize``."""

from __future__ import annotations

import argparse

NAME = "dequantize"
HELP = "Write the dense checkpoint that a 4-bit base (--lora-base-quant nf4) multiplies with, for rollout engines."
EPILOG = """\
The weights are those that training dequantises, bit for bit, at every parallelism, for a model that trains in the
checkpoint's own dtype. One matrix in memory at a time; no GPU, no Megatron. Needs bitsandbytes.

examples:
  slime-lora dequantize --hf-checkpoint Qwen3-32B --out Qwen3-32B-nf4-dense
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    from slime_plugins.lora.arguments import add_quant_details

    parser.add_argument(
        "--hf-checkpoint", required=True, metavar="DIR", help="the dense checkpoint, or one in bitsandbytes' nf4"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the new checkpoint; must not exist, or be empty")
    add_quant_details(parser)


def run(args: argparse.Namespace) -> int:
    """0, or the error that ``cli.main`` prints."""
    from slime_plugins.lora.base.quantization import BaseQuant
    from slime_plugins.lora.quant.dequantize import dequantize_checkpoint

    args.lora_base_quant = "nf4"
    quant = BaseQuant.from_args(args)
    assert quant is not None
    count = dequantize_checkpoint(args.hf_checkpoint, args.out, quant)
    print(f"{count} matrices went through {quant.form} codes")
    print(args.out)
    return 0
