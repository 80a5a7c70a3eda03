"""Bytes that one training step sends through torch.distributed, with and without LoRA. Exit 1 if LoRA adds too much.

    python bench/comm_bytes.py                                 TP=1, 2, 4, with and without SP, both layouts, both ways
    python bench/comm_bytes.py --settings TP=2+SP --rank 64

Every collective is seen where torch dispatches it (``c10d`` operators), whoever calls it and however it was imported;
an operator that this file does not know is an error, so none goes uncounted. Bytes are those that a ring sends from
one rank, with t ranks and N bytes in the full tensor: all-reduce 2 (t-1)/t N, all-gather and reduce-scatter (t-1)/t N.

Allowed, for r the rank (times 3 for a split qkv, 2 for a split fc1), n the tokens, per linear and step:
    by taps: h = A x             2 (t-1)/t n r, SP or not (one all-reduce, or an all-gather and a reduce-scatter)
    fused: h or its gradient     the same without SP; with it (t-1)/t n r, and nothing of a row-parallel linear
    under SP, once per step      2 (t-1)/t of the replicated half's gradient: r in (column linear) or r out (row)
                                 less the final norm's, which trains in the frozen form and not in the LoRA form
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
from _harness import (
    SETTINGS,
    VARIANTS,
    Setting,
    Shapes,
    Trainer,
    cpu_shapes,
    run_ranks,
    table,
    trainer_of,
    write_json,
)
from torch.utils._python_dispatch import TorchDispatchMode

LAYOUTS = ("fused", "split")
LINEARS = ("fused", "taps")
STACKED = {"fused": {}, "split": {"linear_qkv": 3, "linear_fc1": 2}}
"""How many As a linear stacks: the width of h is that many times the rank."""
COLUMN = ("linear_qkv", "linear_fc1")
CPU_SETTINGS = (*SETTINGS, Setting(4, False), Setting(4, True))


class CountBytes(TorchDispatchMode):
    """Adds up the bytes of the collectives entered inside, in ``sent``: operator name -> ring bytes of this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split(".")[0]
        namespace, _, operator = name.partition("::")
        if namespace in ("c10d", "_c10d_functional"):
            self.sent[operator] += _ring_bytes(operator, args)
        return func(*args, **(kwargs or {}))


def _ring_bytes(operator: str, args: tuple) -> int:
    groups = [group for group in map(_group, args) if group is not None]
    if len(groups) != 1:
        raise NotImplementedError(f"c10d::{operator}: found {len(groups)} process groups among its arguments")
    size = groups[0].size()
    if size == 1 or operator == "barrier":
        return 0
    first, second = args[0], args[1]
    if operator == "allreduce_":
        return 2 * _bytes(first) * (size - 1) // size
    if operator in ("_allgather_base_", "allgather_"):  # (output, input, ...): the full tensor is the output
        return _bytes(first) * (size - 1) // size
    if operator in ("_reduce_scatter_base_", "reduce_scatter_"):
        return _bytes(second) * (size - 1) // size
    if operator in ("broadcast_", "send"):
        return _bytes(first)
    if operator == "recv_":
        return 0  # counted where it is sent
    raise NotImplementedError(f"c10d::{operator} is not counted yet; add its bytes to {__file__}")


def _group(value):
    try:
        return torch.distributed.ProcessGroup.unbox(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _bytes(value) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(item) for item in value)


def main() -> int:
    args = parse_args()
    shapes = cpu_shapes(args.hidden, num_layers=args.layers, tokens=args.tokens)
    rows, results, failed = [], [], False
    for setting in CPU_SETTINGS:
        if args.settings and str(setting) not in args.settings:
            continue
        for (layout, linears), result in run_ranks(count, setting, shapes, args.rank, args.layouts)[0].items():
            extra = result["lora"] - result["frozen"]
            allowed = allowed_bytes(setting, shapes, args.rank, layout, linears)
            failed |= extra > allowed
            share = f"{100 * extra / result['frozen']:.2f}%" if result["frozen"] else "-"
            verdict = "TOO MUCH" if extra > allowed else "exact" if extra == allowed else "less"
            sizes = [f"{number:,}" for number in (*(result[v] for v in VARIANTS), extra, allowed)]
            rows.append((f"{setting} {layout} {linears}", *sizes, share, verdict))
            case = {"setting": str(setting), "layout": layout, "linears": linears}
            results.append({**case, **result, "extra": extra, "allowed": allowed})
    print(f"{shapes.num_layers} layers, hidden {shapes.hidden}, {shapes.tokens} tokens, rank {args.rank}, float32;")
    print("bytes sent per rank and step")
    print(table(("setting", "full", "frozen", "LoRA", "LoRA adds", "allowed", "of frozen", ""), rows))
    print(write_json("comm_bytes.json", {"rank": args.rank, "hidden": args.hidden, "results": results}, args.json))
    return 1 if failed else 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="default: 512")
    parser.add_argument("--layers", type=int, default=2, help="default: 2")
    parser.add_argument("--tokens", type=int, default=128, help="default: 128")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default: 16)")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: both")
    parser.add_argument("--settings", nargs="+", metavar="SETTING", help="of TP=1 TP=2 TP=2+SP TP=4 TP=4+SP")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: bench/out/comm_bytes.json")
    return parser.parse_args()


def count(setting: Setting, shapes: Shapes, rank: int, layouts: list[str]) -> dict[tuple[str, str], dict[str, int]]:
    """One rank: layout and way -> variant -> bytes of one step (the second; a first one may set things up)."""
    sent = {}
    for variant in ("full", "frozen"):
        sent[variant] = _count_step(trainer_of(variant, shapes, setting, rank=rank))
    return {
        (layout, linears): {
            **sent,
            "lora": _count_step(trainer_of("lora", shapes, setting, rank=rank, layout=layout, linears=linears)),
        }
        for layout in layouts
        for linears in LINEARS
    }


def _count_step(trainer: Trainer) -> int:
    trainer.step()
    with CountBytes() as counter:
        trainer.step()
    return sum(counter.sent.values())


def allowed_bytes(setting: Setting, shapes: Shapes, rank: int, layout: str, linears: str) -> int:
    """The rank-sized terms of this file's docstring, float32, all linears of all layers."""
    elements = 0
    for leaf, (size_in, size_out) in shapes.linears.items():
        width = rank * STACKED[layout].get(leaf, 1)
        exchanges = 2  # an all-reduce is two of the others
        if linears == "fused" and setting.sequence_parallel:
            exchanges = 1 if leaf in COLUMN else 0
        elements += exchanges * shapes.tokens * width
        if setting.sequence_parallel:
            elements += 2 * (width * size_in if leaf in COLUMN else width * size_out)
    elements *= shapes.num_layers
    if setting.sequence_parallel:
        elements -= 2 * shapes.hidden
    return elements * 4 * (setting.tp - 1) // setting.tp


if __name__ == "__main__":
    sys.exit(main())
