"""A comparison for people: a table per model, a line on recompute per method, and a picture of bars."""

from __future__ import annotations

import os
from collections.abc import Iterator

from slime_plugins.lora.cost.activations import RECOMPUTE
from slime_plugins.lora.cost.compare import Comparison, Method, Peak

_GIB = 2**30
_PARTS = ("base weights", "trained beside", "gradients", "optimizer", "activations", "logits, a layer's work")


def table(comparison: Comparison, gpu_bytes: int) -> str:
    """GiB of the fullest rank: parts under full recompute, then the whole under each kind, then what fits."""
    rows = [["GiB on the fullest rank", *(method.name for method in comparison.methods)]]
    rows.append(["parameters that are trained", *(_count(m.trained_parameters) for m in comparison.methods)])
    rows += [[f"  {part}", *(_part(m, index) for m in comparison.methods)] for index, part in enumerate(_PARTS)]
    for kind in reversed(RECOMPUTE):
        rows.append([f"with {kind} recompute".replace("none", "no"), *(_total(m, kind) for m in comparison.methods)])
    rows.append(["recompute that it needs", *(_needs(method, gpu_bytes) for method in comparison.methods)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) for row in rows]
    return "\n".join([*(line.rstrip() for line in lines), *_refusals(comparison)])


def _refusals(comparison: Comparison) -> Iterator[str]:
    for method in comparison.methods:
        if method.refused:
            yield f"{method.name}: {method.refused}"


def parts_of(peak: Peak) -> tuple[int, ...]:
    """Bytes, in the order of the table."""
    cost = peak.weights
    return (
        cost.base_weights,
        cost.adapter_weights,
        cost.gradients,
        cost.optimizer,
        peak.activations,
        peak.work,
    )


def _part(method: Method, index: int) -> str:
    return _gib(parts_of(method.peaks["full"])[index]) if method.peaks else "-"


def _total(method: Method, kind: str) -> str:
    return _gib(method.peaks[kind].total) if method.peaks else "-"


def _needs(method: Method, gpu_bytes: int) -> str:
    return "-" if not method.peaks else method.least_recompute(gpu_bytes) or "does not fit"


def _gib(count: int) -> str:
    return f"{count / _GIB:.2f}"


def _count(number: int) -> str:
    return f"{number / 1e6:.1f}M" if number >= 1e5 else f"{number:,}"


def draw(comparisons: list[Comparison], path: str | os.PathLike, gpu_bytes: int, title: str) -> None:
    """A PNG: a panel per model, a stacked bar per method; hatched what comes on top without recompute."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.2 + 3.2 * len(comparisons)), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, comparison in zip(figure.subplots(len(comparisons), squeeze=False)[:, 0], comparisons):
        _panel(axis, comparison, gpu_bytes)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def _panel(axis, comparison: Comparison, gpu_bytes: int) -> None:
    methods = [method for method in comparison.methods if method.peaks]
    names = [method.name for method in methods]
    below = [0.0] * len(methods)
    for index, part in enumerate(_PARTS):
        sizes = [parts_of(method.peaks["full"])[index] / _GIB for method in methods]
        axis.barh(names, sizes, left=below, label=part, color=f"C{index}")
        below = [a + b for a, b in zip(below, sizes)]
    more = [max(method.peaks["none"].total / _GIB - end, 0) for method, end in zip(methods, below)]
    axis.barh(names, more, left=below, label="without recompute", color="none", edgecolor="gray", hatch="///")
    axis.axvline(gpu_bytes / _GIB, color="tab:red", linestyle="--", label="--gpu-memory")
    axis.invert_yaxis()
    axis.set(title=comparison.model.name, xlabel="GiB on the fullest rank, full recompute")
    axis.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
