"""Best and final adapter of a run: copies of what it exported, the best with a note of its validation. Stdlib only."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slime_plugins.lora.control.history import BEST, History
from slime_plugins.lora.files.atomic import replaced_directory
from slime_plugins.lora.files.json_text import read_object

NOTE = "validation.json"
"""Beside the best adapter: step, metric and value of its validation."""


def keep(adapter: str | os.PathLike, place: str | os.PathLike, note: Mapping[str, Any] | None = None) -> None:
    """Copy an adapter directory; all of it takes the place of an earlier one, whole or not at all."""
    before = Path(place)
    with replaced_directory(place, drop=tuple(os.listdir(before)) if before.is_dir() else ()) as new:
        shutil.copytree(adapter, new, dirs_exist_ok=True)
        if note is not None:
            (new / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def keep_best(adapter: str | os.PathLike, place: str | os.PathLike, history: History) -> None:
    """Keep an adapter as the best of a history, below ``place``."""
    assert history.rule is not None
    state = history.state
    keep(adapter, Path(place) / BEST, {"step": state.best_step, "metric": history.rule.metric, "value": state.best})


def resume_best(before: str | os.PathLike, place: str | os.PathLike, past: History) -> str | None:
    """Take the best adapter of a run that goes on along, or away if it is of a step that is done again now.

    Args:
        before, place: what ``BEST`` lay in, and what it shall lie in.
        past: the history that the run goes on from.
    Returns:
        What to say about it, if anything.
    """
    if past.rule is None:
        return None
    kept, here = Path(before) / BEST, Path(place)
    best = past.state.best_step
    lost = "" if best is None else f"; that of step {best}, the best until here, is not kept"
    if not kept.is_dir():
        return f"{kept} is not there{lost}" if lost else None
    step, same = _step_of(kept), kept.parent.resolve() == here.resolve()
    if step is not None and step == best:
        if not same:
            keep(kept, here / BEST)
        return None
    if same:
        shutil.rmtree(kept)
    dropped = "dropped" if same else "not taken along"
    return f"{kept} is of {'no known step' if step is None else f'step {step}'}: {dropped}{lost}"


def _step_of(kept: Path) -> int | None:
    note = kept / NOTE
    return read_object(note).get("step") if note.is_file() else None
