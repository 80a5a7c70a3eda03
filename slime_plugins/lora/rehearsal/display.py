"""What a rehearsal prints: one live line on a terminal, one line per step elsewhere, a table at the end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from slime_plugins.lora.rehearsal.outputs import WINDOW, Recorder
from slime_plugins.lora.rehearsal.rewards import RewardSample

_SHOWN = {
    "reward": "reward {:.3f}",
    "eval_reward": "held-out {:.3f}",
    "val_loss": "validation {:.4f}",
    "kl": "kl {:.4f}",
    "loss": "loss {:+.4f}",
    "top_agreement": "agreement {:.3f}",
    "grad_norm": "grad norm {:.3f}",
    "tokens_per_s": "{:,.0f} tokens/s",
}
"""Metrics of a step's line, in this order, each where there is one."""
_SHOWN_CHARACTERS = 60


class Display:
    """Prints to stdout."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._start = time.monotonic()

    def line(self, text: str) -> None:
        """One plain line, or several."""
        self._console.print(text, markup=False)

    @contextlib.contextmanager
    def steps(self, total: int, first: int = 0) -> Iterator[None]:
        """Inside, ``step`` moves the progress line, which starts at ``first``."""
        columns = [TextColumn("step"), MofNCompleteColumn(), BarColumn(20), TextColumn("{task.description}")]
        columns += [TimeRemainingColumn(compact=True)]
        with Progress(*columns, console=self._console, disable=not self._console.is_terminal) as progress:
            self._progress, self._total = progress, total
            self._task = progress.add_task("first step ...", total=total, completed=first)
            yield
        self._progress = None

    def step(self, metrics: dict, recorder: Recorder) -> None:
        """Show one step's metrics, and the mean of the rewards of the last steps."""
        parts = [form.format(metrics[name]) for name, form in _SHOWN.items() if name in metrics]
        if "reward" in metrics:
            parts.insert(1, f"(mean of {min(WINDOW, len(recorder.steps))}: {recorder.mean('reward'):.3f})")
        text = "  ".join(parts)
        if self._progress is not None:
            self._progress.update(self._task, advance=1, description=text)
        if not self._console.is_terminal:
            self.line(f"step {metrics['step']}/{self._total}  {text}")

    def samples(self, samples: Sequence[RewardSample]) -> None:
        """A line each."""
        for sample in samples:
            prompt = sample.prompt if isinstance(sample.prompt, str) else str(sample.prompt[-1])
            self.line(f"  {_short(prompt)} -> {_short(sample.response)}  reward {sample.reward:g}")

    def end(self, out: Path, curve: str, summary: dict) -> None:
        """The result, where it is, and last the command that serves it."""
        trainable, total = summary["trainable_parameters"], summary["total_parameters"]
        rows = [
            *_results(summary),
            ("steps", f"{summary['steps']}, {summary['seconds_per_step']:.2f} s each"),
            ("trainable", f"{trainable:,} of {total:,} parameters ({100 * trainable / total:.2f} %)"),
            ("logits", f"Megatron against transformers + PEFT: {summary['logits_max_abs_diff']:.1e} at most"),
            ("base", f"unchanged, sha256 {summary['base_checksum_after'][:16]}"),
            ("written", f"{out}: adapter/ metrics.jsonl samples.jsonl tensorboard/ {curve} summary.json serve/"),
            ("in all", f"{time.monotonic() - self._start:.0f} s"),
        ]
        for name, text in rows:
            self.line(f"{name:<12} {text}")
        self.line("Serve it:")
        self.line(summary["serve_command"])


def _results(summary: dict) -> Iterator[tuple[str, str]]:
    window = min(WINDOW, summary["steps"])
    for name, label in (("reward", "mean reward"), ("loss", "loss")):
        # Where rewards are trained on, the loss says nothing: its mean is 0 by construction.
        if f"{name}_first" in summary and not (name == "loss" and "steps_without_signal" in summary):
            last = f"{summary[f'{name}_last']:.3f} (mean of the last {window} steps: {summary[f'{name}_window']:.3f})"
            yield label, f"{summary[f'{name}_first']:.3f} -> {last}"
    if "eval_reward_last" in summary:
        yield "held-out", f"{summary['eval_reward_first']:.3f} -> {summary['eval_reward_last']:.3f}"
    if "best" in summary:
        yield "best", f"{summary['best']:.4f} after step {summary['best_step']}, in best/"
    if summary.get("stopped"):
        yield "stopped", summary["stopped"]
    if "teacher_reward" in summary:
        yield "distilled", f"student {summary['student_reward']:.3f}, teacher {summary['teacher_reward']:.3f}"
    if summary.get("steps_without_signal"):
        yield "no signal", f"in {summary['steps_without_signal']} of {summary['steps']} steps no rewards differed"


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[:_SHOWN_CHARACTERS]} ...'"
