"""The history of a run for people: a table, and a picture of the same."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

from slime_plugins.lora.control.history import History


def table(history: History) -> str:
    """A line per validation: step, learning rate, metrics, ``*`` at the best one, what was decided. Then the end."""
    names = metric_names(history)
    rows = [["step", "lr", *names, "", "decision"]]
    for entry in history.entries:
        values = [f"{entry.metrics[name]:.6g}" if name in entry.metrics else "" for name in names]
        star = "*" if history.is_best(entry.step) else ""
        rows.append([str(entry.step), f"{entry.lr:g}", *values, star, entry.decision])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = ["  ".join([*(cell.rjust(width) for cell, width in zip(row, widths)), row[-1]]).rstrip() for row in rows]
    return "\n".join([*lines, *_end(history)])


def metric_names(history: History) -> list[str]:
    """Every metric that was measured, that of the rule first."""
    names = dict.fromkeys(name for entry in history.entries for name in entry.metrics)
    first = [history.rule.metric] if history.rule and history.rule.metric in names else []
    return list(dict.fromkeys([*first, *names]))


def draw(history: History, path: str | os.PathLike, title: str) -> None:
    """A PNG: a panel per metric, with the best and the stop marked, and one of the learning rate.

    Raises ValueError for a history without a validation.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = metric_names(history)
    if not names:
        raise ValueError("the history holds no validation yet: there is nothing to draw")
    figure = Figure(figsize=(8, 2.6 * (len(names) + 1)), layout="constrained")
    FigureCanvasAgg(figure)
    *panels, rate = figure.subplots(len(names) + 1, sharex=True, squeeze=False)[:, 0]
    for axis, name in zip(panels, names):
        points = [(e.step, e.metrics[name]) for e in history.entries if math.isfinite(e.metrics.get(name, math.nan))]
        axis.plot(*zip(*points), color="tab:blue", marker=".") if points else None
        axis.set_ylabel(name)
        if history.rule and name == history.rule.metric:
            _mark(axis, history)
    steps, rates = [entry.step for entry in history.entries], [entry.lr for entry in history.entries]
    rate.step([*steps, steps[-1]], [*rates, history.state.lr], where="pre", color="tab:orange")
    rate.set(xlabel="step", ylabel="learning rate")
    rate.set_ylim(bottom=0)
    rate.xaxis.get_major_locator().set_params(integer=True)
    for axis in (*panels, rate):
        axis.grid(alpha=0.3)
    panels[0].set_title(title)
    figure.savefig(path, dpi=120)


def _mark(axis, history: History) -> None:
    state = history.state
    if state.best is not None:
        axis.plot(state.best_step, state.best, "*", color="tab:green", markersize=14, label=f"best: {state.best:.4g}")
    if history.stopped_at is not None:
        axis.axvline(history.stopped_at, color="tab:red", linestyle="--", label="stopped")
    if history.rule and history.rule.stop_metric is not None:
        axis.axhline(history.rule.stop_metric, color="tab:gray", linestyle=":", label="--stop-metric")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False)


def _end(history: History) -> Iterator[str]:
    state = history.state
    if state.best_step is not None:
        yield f"best: {state.best:.6g} after step {state.best_step}"
    if history.rule is not None:
        yield f"learning rate: {history.lr:g} at the start, {state.lr:g} now"
    if state.stopped:
        yield f"stopped after step {history.stopped_at}: {state.stopped}"
