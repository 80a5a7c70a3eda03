"""``training_history.json``: every validation of a run, the learning rate then, and what was decided. Stdlib only.

Written after every validation, one line for each, for people as for programs. A resumed run reads the validations of
the steps that it does not repeat and folds the rule over them, so it knows what the run that went on would: there is
nothing about it in checkpoints. ``step``, ``lr`` (that the steps before were trained with) and metrics are what is
read; ``decision``, ``best`` and ``stopped`` are written for people, and follow from them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slime_plugins.lora.control.plateau import Plateau, State, Validation, decide, start
from slime_plugins.lora.files.json_text import read_object

FILE = "training_history.json"
BEST, FINAL = "best", "final"
"""Adapter directories: after the best validation, and after the last step."""


@dataclass(frozen=True)
class Entry:
    """One moment at which something was measured."""

    step: int
    """Steps of training before it."""
    lr: float
    """Of the step before."""
    metrics: Mapping[str, float]
    """``val_loss``, ``eval/NAME``; NaN or infinite where it was."""
    decision: str = ""


@dataclass
class History:
    """The validations of one run, and what follows from them."""

    rule: Plateau | None
    """None: validations are noted, nothing is decided."""
    lr: float
    """That the run starts with."""
    entries: list[Entry] = field(default_factory=list)

    def __post_init__(self) -> None:
        entries, self.entries = self.entries, []
        self.state = start(self.rule) if self.rule else State(lr=self.lr)
        for entry in entries:
            self.add(entry.step, entry.metrics)

    def add(self, step: int, metrics: Mapping[str, float]) -> Entry:
        """Note what was measured after ``step`` steps, and decide. After a stop nothing is decided any more."""
        before, decision = self.state, ""
        if self.rule is not None and self.rule.metric in metrics and not before.stopped:
            self.state, decision = decide(self.rule, before, Validation(step, metrics[self.rule.metric]))
        self.entries.append(Entry(step, before.lr, dict(metrics), decision))
        return self.entries[-1]

    @property
    def factor(self) -> float:
        """What is left of the learning rate that the run started with."""
        return self.state.lr / self.lr

    def is_best(self, step: int) -> bool:
        """Was the validation after ``step`` steps the best so far?"""
        return self.state.best_step == step

    @property
    def stopped_at(self) -> int | None:
        """The step after which the run was stopped."""
        return max((e.step for e in self.entries if e.decision), default=None) if self.state.stopped else None

    def write(self, directory: str | os.PathLike) -> Path:
        """Put it in place of an earlier one, whole or not at all."""
        path = Path(directory) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{FILE}.tmp")
        with open(new, "w", encoding="utf-8") as file:
            file.write(self.text())
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
        return path

    def text(self) -> str:
        """JSON with a line for each validation."""
        state = self.state
        best = None if state.best_step is None else {"step": state.best_step, "value": state.best}
        stopped = {"step": self.stopped_at, "why": state.stopped} if state.stopped else None
        lines = [json.dumps(_written(entry)) for entry in self.entries]
        parts = {
            "rule": json.dumps(dataclasses.asdict(self.rule) if self.rule else None),
            "lr": json.dumps(self.lr),
            "validations": "[\n    " + ",\n    ".join(lines) + "\n  ]" if lines else "[]",
            "best": json.dumps(best),
            "stopped": json.dumps(stopped),
        }
        return "{\n" + ",\n".join(f'  "{name}": {text}' for name, text in parts.items()) + "\n}\n"


def read(directory: str | os.PathLike, rule: Plateau | None, lr: float, *, until: int) -> History | None:
    """The history of a run that goes on after ``until`` steps; None where there is none.

    What is decided is by the rule that is given, which is the flags of now.

    Raises:
        ValueError, OSError: a file that is not what ``write`` writes, naming it.
    """
    path = Path(directory) / FILE
    if not path.exists():
        return None
    return History(rule, lr, [entry for entry in load(path).entries if entry.step <= until])


def load(path: str | os.PathLike) -> History:
    """A whole file, under its own rule. Raises ValueError, OSError naming it."""
    content = read_object(Path(path))
    try:
        rule = None if content["rule"] is None else Plateau(**content["rule"])
        return History(rule, float(content["lr"]), [_read(entry) for entry in content["validations"]])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a training history: {type(error).__name__}: {error}") from None


def _written(entry: Entry) -> dict[str, Any]:
    metrics = {name: value if math.isfinite(value) else str(value) for name, value in entry.metrics.items()}
    decision = {"decision": entry.decision} if entry.decision else {}
    return {"step": entry.step, "lr": entry.lr, **metrics, **decision}


def _read(entry: Mapping[str, Any]) -> Entry:
    metrics = {name: float(value) for name, value in entry.items() if name not in ("step", "lr", "decision")}
    if type(entry["step"]) is not int:
        raise ValueError(f"step is {entry['step']!r:.60}")
    return Entry(entry["step"], float(entry["lr"]), metrics)
