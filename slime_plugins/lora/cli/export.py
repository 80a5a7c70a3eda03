"""``slime-lora export``: a sharded checkpoint to a PEFT adapter, or merged into its base. Text and printing only."""

from __future__ import annotations

import argparse
import sys

from slime_plugins.lora.cli.arguments import check_out, lost, place

FORMATS = ("per-expert", "fused")  # peft.experts_form.FORMATS, which costs torch to import
NAME = "export"
HELP = "Turn a sharded adapter checkpoint into a PEFT adapter, or merge it into its base."
EPILOG = """\
One plain process: no GPU, no process group, no Megatron. Every byte that is read is compared with its checksum, and
the whole base with what the checkpoint notes of the one that it was trained on: that is read once, and remembered. The
last line printed is the path written.

examples:
  slime-lora export --checkpoint runs/math --hf-checkpoint Qwen3-4B --out math-adapter
  slime-lora export --checkpoint runs/math/iter_0000100 --hf-checkpoint Qwen3-4B --out math-adapter --serve-dir serve
  slime-lora export --checkpoint runs/math --hf-checkpoint Qwen3-4B --out Qwen3-4B-math --merge
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=place,
        metavar="DIR",
        help="a run's directory (its latest checkpoint), or one in it",
    )
    parser.add_argument(
        "--hf-checkpoint", required=True, type=place, metavar="DIR", help="the base that it was trained on"
    )
    parser.add_argument(
        "--out", required=True, type=place, metavar="DIR", help="the adapter, or with --merge the merged model"
    )
    parser.add_argument("--merge", action="store_true", help="write a full checkpoint: base plus adapter")
    parser.add_argument(
        "--merge-onto",
        choices=("trained", "original"),
        default="trained",
        help="an adapter of a 4-bit base: its dequantised weights, on which it was trained, or those of "
        "--hf-checkpoint, on which it answers otherwise (default: %(default)s)",
    )
    parser.add_argument(
        "--peft-patterns",
        action="store_true",
        help="ranks and alphas as trained, in rank_pattern and alpha_pattern, which SGLang ignores; "
        "default: one rank, one alpha",
    )
    parser.add_argument(
        "--moe-format",
        choices=FORMATS,
        default=FORMATS[0],
        help="of routed experts: per-expert (vLLM, SGLang, PEFT) or fused, PEFT's stacked parameters (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--serve-dir",
        type=place,
        metavar="DIR",
        help="also make a directory of links to base and adapter, for transformers serve",
    )


def run(args: argparse.Namespace) -> int:
    """Write what was asked for; 0, or the error that ``cli.main`` prints."""
    from slime_plugins.lora.base.checkpoint import BaseCheckpoint
    from slime_plugins.lora.checkpoint.reader import AdapterCheckpoint
    from slime_plugins.lora.errors import UsageError

    if args.merge and (args.peft_patterns or args.serve_dir):
        flag = "--peft-patterns" if args.peft_patterns else "--serve-dir"
        raise UsageError(f"--merge writes a full model, for which {flag} has no meaning; leave one of them out")
    sources = {"--checkpoint": args.checkpoint, "--hf-checkpoint": args.hf_checkpoint}
    check_out("--out", args.out, sources)
    if args.serve_dir is not None:
        check_out("--serve-dir", args.serve_dir, sources | {"--out": args.out})
    checkpoint = AdapterCheckpoint(args.checkpoint)
    base = BaseCheckpoint(args.hf_checkpoint)
    compared = checkpoint.check_base(base)
    projections = list(checkpoint.projections())
    parameters = sum(p.A.numel() + p.B.numel() for p in projections)
    step = "no step" if checkpoint.manifest.step is None else f"step {checkpoint.manifest.step}"
    print(f"{checkpoint.path}: {step}, {len(projections)} adapted matrices, {parameters:,} parameters")
    print(f"base compared: {compared}")
    if args.merge:
        _merge(projections, checkpoint.base_quant, base, args)
    else:
        _export(projections, checkpoint, base, args)
    print(args.serve_dir or args.out)
    return 0


def _export(projections, checkpoint, base, args: argparse.Namespace) -> None:
    from slime_plugins.lora.base.fingerprint import weights_digest
    from slime_plugins.lora.peft.directory import write_adapter
    from slime_plugins.lora.peft.form import to_peft
    from slime_plugins.lora.peft.serve_dir import make_serve_dir
    from slime_plugins.lora.quant.dequantize import is_dequantised

    adapter = to_peft(
        projections,
        base,
        dropout=checkpoint.manifest.config.dropout,
        patterns=args.peft_patterns,
        moe_format=args.moe_format,
    )
    digest = weights_digest(base, checkpoint.manifest.base["dtype"])
    quant = None if is_dequantised(base.directory) else checkpoint.base_quant  # it lies on dense weights there
    write_adapter(args.out, *adapter, base=base, base_digest=digest, base_quant=quant)
    if args.serve_dir:
        make_serve_dir(args.hf_checkpoint, args.out, args.serve_dir)
        print(f"serve it with: transformers serve {args.serve_dir}")


def _merge(projections, quant, base, args: argparse.Namespace) -> None:
    from slime_plugins.lora.base.merge import merge_checkpoint
    from slime_plugins.lora.quant.dequantize import as_trained

    onto = as_trained(base, quant) if args.merge_onto == "trained" else {}
    if onto:
        print(f"merging onto the {quant.form} base that it was trained on, dequantised")
    elif as_trained(base, quant):
        print(
            f"slime-lora: warning: the adapter was trained on a {quant.form} base; merged onto the original weights "
            "it answers otherwise",
            file=sys.stderr,
        )
    print(lost(merge_checkpoint(projections, base, args.out, **onto)))
