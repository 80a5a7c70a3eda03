"""Seconds per training step: full fine-tuning, frozen base, LoRA fused and by taps, side by side in one run.

    python bench/step_time.py                          hidden 1024 and 512; TP=1, TP=2, TP=2+SP; a few minutes
    python bench/step_time.py --hidden 1024 --rounds 30

The forms take turns (full frozen lora taps full frozen ...), so that whatever else the machine does hits all of
them; a ratio is the median over the rounds of the ratio within a round. Processor time is the sum over all threads
of a rank, averaged over ranks: other work on the machine does not count into it, waiting for a peer neither.
With a CUDA device: bf16, Qwen3-4B's shapes, wall time only.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch
from _harness import (
    VARIANTS,
    Setting,
    Shapes,
    cpu_shapes,
    paired_ratio,
    qwen3_4b,
    run_ranks,
    saved_activation_bytes,
    settings_here,
    table,
    take_turns,
    trainer_of,
    write_json,
)

FORMS = (*VARIANTS, "taps")
"""``lora`` runs fused; ``taps`` is the same adapters with ``--lora-linears taps``."""
TARGETS = {1: 1.05, 2: 1.12}
"""Tensor-parallel size -> the LoRA step over the frozen step that this project aims at."""


def main() -> int:
    args = parse_args()
    results = []
    for shapes in shapes_of(args):
        for setting in settings_here():
            if args.settings and str(setting) not in args.settings:
                continue
            how = (args.rank, args.layout, not args.no_embedding_gradient)
            ranks = run_ranks(measure, setting, shapes, how, args.rounds, args.warmup)
            result = summarize(setting, shapes, ranks)
            results.append(result)
            print(line_of(result), file=sys.stderr, flush=True)
    print(render(results, args.rank, args.layout))
    flags = {name: getattr(args, name) for name in ("rank", "layout", "no_embedding_gradient", "rounds")}
    print(write_json("step_time.json", {**flags, "results": results}, args.json))
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[1024, 512], help="on a CPU (default: 1024 512)")
    parser.add_argument("--layers", type=int, help="default: 4 on a CPU, 12 of Qwen3-4B's 36 with CUDA")
    parser.add_argument("--tokens", type=int, help="default: 512 on a CPU, 2048 with CUDA")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default: 16)")
    parser.add_argument("--layout", choices=("fused", "split"), default="fused")
    parser.add_argument(
        "--no-embedding-gradient",
        action="store_true",
        help="LoRA as it runs without activation recompute: the first layer's input needs no gradient",
    )
    parser.add_argument("--rounds", type=int, default=12, help="measured rounds (default: 12)")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them (default: 2)")
    parser.add_argument("--settings", nargs="+", metavar="SETTING", help="of TP=1 TP=2 TP=2+SP (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: bench/out/step_time.json")
    return parser.parse_args()


def shapes_of(args: argparse.Namespace) -> list[Shapes]:
    if torch.cuda.is_available():
        return [qwen3_4b(num_layers=args.layers or 12, tokens=args.tokens or 2048)]
    return [cpu_shapes(h, num_layers=args.layers or 4, tokens=args.tokens or 512) for h in args.hidden]


def measure(setting: Setting, shapes: Shapes, how: tuple[int, str, bool], rounds: int, warmup: int) -> dict:
    """One rank's seconds: variant -> list over rounds, for wall and processor time."""
    rank, layout, embedding_gradient = how
    of_all = dict(rank=rank, layout=layout, embedding_gradient=embedding_gradient)
    trainers = {name: trainer_of(name, shapes, setting, **of_all) for name in VARIANTS}
    trainers["taps"] = trainer_of("lora", shapes, setting, linears="taps", **of_all)
    saved = {name: saved_activation_bytes(trainer) for name, trainer in trainers.items()}
    seconds = take_turns(trainers, rounds, warmup)
    return {**seconds, "trainable": {n: t.trainable for n, t in trainers.items()}, "saved_bytes": saved}


def summarize(setting: Setting, shapes: Shapes, ranks: list[dict]) -> dict:
    """Medians and paired ratios. Wall: the slowest rank of a step; processor time: the mean over ranks."""
    result = {"setting": str(setting), "tp": setting.tp, "hidden": shapes.hidden, "layers": shapes.num_layers}
    result |= {"tokens": shapes.tokens, "trainable_rank0": ranks[0]["trainable"]}
    result["saved_mib_rank0"] = {name: size / 2**20 for name, size in ranks[0]["saved_bytes"].items()}
    for clock, over_ranks in (("wall", max), ("cpu", statistics.fmean)):
        steps = {v: [over_ranks(values) for values in zip(*(r[clock][v] for r in ranks))] for v in FORMS}
        result[clock] = {
            "median_seconds": {v: statistics.median(steps[v]) for v in FORMS},
            "lora_over_frozen": paired_ratio(steps["lora"], steps["frozen"]),
            "taps_over_frozen": paired_ratio(steps["taps"], steps["frozen"]),
            "full_over_lora": paired_ratio(steps["full"], steps["lora"]),
            "full_over_frozen": paired_ratio(steps["full"], steps["frozen"]),
        }
    return result


def line_of(result: dict) -> str:
    clock = result["wall"] if torch.cuda.is_available() else result["cpu"]
    return f"hidden {result['hidden']} {result['setting']}: LoRA/frozen {clock['lora_over_frozen']['median']:.3f}"


def render(results: list[dict], rank: int, layout: str) -> str:
    header = (
        "hidden, setting",
        "full s",
        "frozen s",
        "LoRA s",
        "LoRA/frozen",
        "(quartiles)",
        "by taps",
        "wall",
        "target",
    )
    header += ("full/LoRA", "wall", "kept MiB frozen", "LoRA")
    rows = []
    for result in results:
        clock = "wall" if torch.cuda.is_available() else "cpu"
        seconds, over_frozen = result[clock]["median_seconds"], result[clock]["lora_over_frozen"]
        saved = result["saved_mib_rank0"]
        rows.append(
            (
                f"{result['hidden']} {result['setting']}",
                *(f"{seconds[v]:.3f}" for v in VARIANTS),
                f"{over_frozen['median']:.3f}",
                f"{over_frozen['quartile_1']:.3f}-{over_frozen['quartile_3']:.3f}",
                f"{result[clock]['taps_over_frozen']['median']:.3f}",
                f"{result['wall']['lora_over_frozen']['median']:.3f}",
                f"{TARGETS[result['tp']]:.2f}",
                f"{result[clock]['full_over_lora']['median']:.2f}",
                f"{result['wall']['full_over_lora']['median']:.2f}",
                f"{saved['frozen']:.1f}",
                f"{saved['lora']:.1f}",
            )
        )
    clock = "wall time" if torch.cuda.is_available() else "processor time per rank, except where it says wall"
    first = results[0]
    title = f"{first['layers']} layers, {first['tokens']} tokens, rank {rank}, all four linears, {layout}; {clock}"
    return f"{title}\n{table(header, rows)}"


if __name__ == "__main__":
    sys.exit(main())
