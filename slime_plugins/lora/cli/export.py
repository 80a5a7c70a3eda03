"""``slime-lora export``: a sharded checkpoint to a PEFT adapter, or merged into its base. Text and printing only."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from slime_plugins.lora.cli.arguments import add_names, check_out, lost, place
from slime_plugins.lora.cli.onto import add_merge_onto, onto

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
    add_merge_onto(parser)
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
    add_names(parser)
    parser.add_argument(
        "--bake-tokens",
        type=place,
        metavar="DIR",
        help="also write a base with the trained vocabulary rows in it, links for the rest: --out is then a plain "
        "adapter on it, which vLLM and SGLang serve",
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

    names = args.names != "module"
    if args.merge and (args.peft_patterns or args.serve_dir or names):
        flag = "--peft-patterns" if args.peft_patterns else "--serve-dir" if args.serve_dir else "--names"
        raise UsageError(f"--merge writes a full model, for which {flag} has no meaning; leave one of them out")
    sources = {"--checkpoint": args.checkpoint, "--hf-checkpoint": args.hf_checkpoint}
    check_out("--out", args.out, sources)
    if args.serve_dir is not None:
        check_out("--serve-dir", args.serve_dir, sources | {"--out": args.out})
    if args.bake_tokens is not None:
        if args.merge:
            raise UsageError("--merge has the trained rows in its model already; leave out --bake-tokens")
        check_out("--bake-tokens", args.bake_tokens, sources | {"--out": args.out})
    checkpoint = AdapterCheckpoint(args.checkpoint)
    base = BaseCheckpoint(args.hf_checkpoint)
    compared = checkpoint.check_base(base)
    projections = list(checkpoint.projections())
    rows = checkpoint.rows()
    parameters = sum(p.A.numel() + p.B.numel() for p in projections) + sum(one.delta.numel() for one in rows)
    step = "no step" if checkpoint.manifest.step is None else f"step {checkpoint.manifest.step}"
    print(f"{checkpoint.path}: {step}, {len(projections)} adapted matrices, {parameters:,} parameters")
    for one in rows:
        print(f"{len(one.ids)} trained rows of {one.leaf}")
    print(f"base compared: {compared}")
    if args.bake_tokens is not None:
        base, rows = _bake(projections, rows, base, args.bake_tokens), []
    if args.merge:
        _merge(projections, rows, checkpoint.base_quant, base, args)
    else:
        _export(projections, rows, checkpoint, base, args)
    print(args.serve_dir or args.out)
    return 0


def _bake(projections, rows, base, out: str):
    """The base that has the rows; what is left of the adapter is on it."""
    from slime_plugins.lora.base.checkpoint import BaseCheckpoint
    from slime_plugins.lora.base.rewrite import rewrite
    from slime_plugins.lora.errors import UsageError
    from slime_plugins.lora.peft.rows import written

    if not rows or not projections:
        has = "no trained vocabulary rows" if not rows else "nothing but vocabulary rows: --merge gives the same model"
        raise UsageError(f"--bake-tokens: the checkpoint has {has}; leave it out")
    change, names = written(rows, base)
    links = rewrite(base, Path(out), names, change, link_rest=True)
    how = ", ".join(f"{count} by {how}" for how, count in links.items()) or "none"
    print(f"base with the rows: {out}; other files of weights: {how}")
    return BaseCheckpoint(out)


def _export(projections, rows, checkpoint, base, args: argparse.Namespace) -> None:
    from slime_plugins.lora.base.fingerprint import weights_digest
    from slime_plugins.lora.peft.directory import write_adapter
    from slime_plugins.lora.peft.experts_export import unread_by_peft
    from slime_plugins.lora.peft.extra import FOLDER, extra_of, put_extra
    from slime_plugins.lora.peft.form import to_peft
    from slime_plugins.lora.peft.serve_dir import make_serve_dir
    from slime_plugins.lora.quant.dequantize import is_dequantised

    adapter = to_peft(
        projections,
        base,
        dropout=checkpoint.manifest.config.dropout,
        patterns=args.peft_patterns,
        moe_format=args.moe_format,
        names=args.names,
        rows=rows,
    )
    unread = unread_by_peft(base, args.names, args.moe_format, (p.name for p in projections))
    if unread:
        print(f"slime-lora: warning: {unread}", file=sys.stderr)
    digest = weights_digest(base, checkpoint.manifest.base["dtype"])
    quant = None if is_dequantised(base.directory) else checkpoint.base_quant  # it lies on dense weights there
    write_adapter(args.out, *adapter, base=base, base_digest=digest, base_quant=quant)
    extra = extra_of(checkpoint.path.parent)
    put_extra(args.out, extra)
    if extra:
        print(f"also trained, beside the adapter: {', '.join(extra)}, in {args.out}/{FOLDER}")
    if rows:
        way = "--bake-tokens DIR" if projections else "--merge"
        print(f"vLLM refuses an adapter with trained rows, SGLang passes over them: for those servers add {way}")
    if args.serve_dir:
        make_serve_dir(args.bake_tokens or args.hf_checkpoint, args.out, args.serve_dir)
        print(f"serve it with: transformers serve {args.serve_dir}")


def _merge(projections, rows, quant, base, args: argparse.Namespace) -> None:
    from slime_plugins.lora.base.merge import merge_checkpoint
    from slime_plugins.lora.peft.rows import with_rows_on

    what = with_rows_on(rows, base, **onto(quant, base, args.merge_onto))
    print(lost(merge_checkpoint(projections, base, args.out, **what)))
