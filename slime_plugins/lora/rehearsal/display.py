"""What a rehearsal prints: one live line on a terminal, one line per step elsewhere, a table at the end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """Prints to stdout."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
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
            progress.add_task("first rollout ...", total=total, completed=first)
            yield
        self._progress = None

    def step(self, metrics: dict) -> None:
        """Show one step's metrics."""
        text = (
            f"reward {metrics['reward']:.3f}  kl {metrics['kl']:.4f}  loss {metrics['loss']:+.4f}  "
            f"grad norm {metrics['grad_norm']:.3f}  {metrics['tokens_per_s']:,.0f} tokens/s"
        )
        self._progress.update(0, advance=1, description=text)
        if not self._console.is_terminal:
            self.line(f"step {metrics['step'] + 1}/{self._total}  {text}")

    def end(self, out: Path, summary: dict) -> None:
        """The result, where it is, and last the command that serves it."""
        trainable, total = summary["trainable_parameters"], summary["total_parameters"]
        rows = [
            ("mean reward", f"{summary['reward_first']:.3f} -> {summary['reward_last']:.3f}"),
            ("steps", f"{summary['steps']}, {summary['seconds_per_step']:.2f} s each"),
            ("trainable", f"{trainable:,} of {total:,} parameters ({100 * trainable / total:.2f} %)"),
            ("logits", f"Megatron against transformers + PEFT: {summary['logits_max_abs_diff']:.1e} at most"),
            ("base", f"unchanged, sha256 {summary['base_checksum_after'][:16]}"),
            ("written", f"{out}: adapter/ metrics.jsonl tensorboard/ reward.png summary.json serve/"),
            ("in all", f"{time.monotonic() - self._start:.0f} s"),
        ]
        for name, text in rows:
            self.line(f"{name:<12} {text}")
        self.line("Serve it:")
        self.line(summary["serve_command"])
