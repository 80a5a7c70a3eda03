"""Seconds per training step: LoRA on a 4-bit base over LoRA on the dense base, with and without recomputation.

    python bench/qlora.py                       hidden 1024, 128, 512 and 2048 tokens, TP=1; a few minutes
    python bench/qlora.py --tokens 512 --rounds 20 --settings TP=2

The two take turns, as in step_time.py; a ratio is the median over the rounds of the ratio within a round. Bytes: of
the base's weights on a rank. Needs bitsandbytes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch
from _harness import (
    Setting,
    Shapes,
    Trainer,
    add_lora,
    build_model,
    cpu_shapes,
    paired_ratio,
    qwen3_4b,
    require_grad,
    run_ranks,
    settings_here,
    table,
    take_turns,
    write_json,
)

TARGET = 1.25
"""A step on NF4 over one on the dense base, at 512 tokens and more."""


def main() -> int:
    args = parse_args()
    results = []
    for tokens in args.tokens:
        shapes = qwen3_4b(num_layers=args.layers, tokens=tokens) if torch.cuda.is_available() else None
        shapes = shapes or cpu_shapes(args.hidden, num_layers=args.layers, tokens=tokens)
        for setting in settings_here():
            if str(setting) not in args.settings:
                continue
            for recompute in (False, True):
                ranks = run_ranks(measure, setting, shapes, args.rank, recompute, args.rounds, args.warmup)
                results.append(summarize(setting, shapes, recompute, ranks))
                print(results[-1], file=sys.stderr, flush=True)
    print(render(results))
    print(write_json("qlora.json", {"rank": args.rank, "rounds": args.rounds, "results": results}, args.json))
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024, help="on a CPU (default: 1024)")
    parser.add_argument("--layers", type=int, default=2, help="default: 2")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 2048], help="default: 128 512 2048")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (default: 8)")
    parser.add_argument("--rounds", type=int, default=8, help="measured rounds (default: 8)")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them (default: 2)")
    parser.add_argument("--settings", nargs="+", default=["TP=1"], metavar="SETTING", help="default: TP=1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: bench/out/qlora.json")
    return parser.parse_args()


def trainer(quantised: bool, shapes: Shapes, setting: Setting, rank: int, recompute: bool) -> tuple[Trainer, int]:
    """The model ready to step, and the bytes of its decoder linears."""
    from slime_plugins.lora import quantize_base

    model = build_model(shapes, setting)
    if recompute:
        model.config.recompute_granularity, model.config.recompute_method = "full", "uniform"
        model.config.recompute_num_layers = 1
    weights = [p for name, p in model.named_parameters() if name.endswith("weight") and ".linear_" in name]
    size = sum(p.nbytes for p in weights)
    if quantised:
        size = quantize_base(model).packed_bytes
    add_lora(model, rank=rank)
    model.embedding.register_forward_hook(require_grad)
    return Trainer(model, shapes.vocab_size, shapes.tokens), size


def measure(setting: Setting, shapes: Shapes, rank: int, recompute: bool, rounds: int, warmup: int) -> dict:
    """One rank's seconds, as ``take_turns`` has them, and bytes."""
    made = {name: trainer(name == "nf4", shapes, setting, rank, recompute) for name in ("dense", "nf4")}
    seconds = take_turns({name: one for name, (one, _) in made.items()}, rounds, warmup)
    return {**seconds, "bytes": {name: size for name, (_, size) in made.items()}}


def summarize(setting: Setting, shapes: Shapes, recompute: bool, ranks: list[dict]) -> dict:
    """Medians and paired ratios. Wall: the slowest rank of a step; processor time: the mean over ranks."""
    result = {"setting": str(setting), "hidden": shapes.hidden, "tokens": shapes.tokens, "recompute": recompute}
    result["bytes"] = ranks[0]["bytes"]
    for clock, over_ranks in (("wall", max), ("cpu", statistics.fmean)):
        steps = {v: [over_ranks(values) for values in zip(*(r[clock][v] for r in ranks))] for v in ("dense", "nf4")}
        result[clock] = {v: statistics.median(steps[v]) for v in steps}
        result[clock]["nf4_over_dense"] = paired_ratio(steps["nf4"], steps["dense"])
    return result


def render(results: list[dict]) -> str:
    header = (
        "tokens, setting",
        "recompute",
        "dense s",
        "NF4 s",
        "NF4/dense",
        "(quartiles)",
        "wall",
        "target",
        "bytes",
    )
    rows = []
    for result in results:
        clock = result["wall" if torch.cuda.is_available() else "cpu"]
        ratio = clock["nf4_over_dense"]
        rows.append(
            (
                f"{result['tokens']} {result['setting']}",
                "full" if result["recompute"] else "none",
                f"{clock['dense']:.3f}",
                f"{clock['nf4']:.3f}",
                f"{ratio['median']:.3f}",
                f"{ratio['quartile_1']:.3f}-{ratio['quartile_3']:.3f}",
                f"{result['wall']['nf4_over_dense']['median']:.3f}",
                f"{TARGET:.2f}" if result["tokens"] >= 512 else "-",
                f"{result['bytes']['nf4'] / result['bytes']['dense']:.3f}",
            )
        )
    return table(header, rows)


if __name__ == "__main__":
    raise SystemExit(main())
