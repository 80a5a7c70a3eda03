"""Where slime keeps checkpoints, read without Megatron: which of them hold adapters, which a base."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
ADAPTER_FILE = "adapter.json"
"""In every step directory of an adapter checkpoint, and in no other."""


def step_dir(path: str | Path, step: int | None = None) -> Path | None:
    """The directory of one step of a Megatron checkpoint: the one asked for, else the latest; None if there is none.

    ``path`` may also be a step directory itself (``iter_0000010``, ``release``).
    """
    path = Path(path)
    if re.fullmatch(r"iter_\d{7}|release", path.name):
        return path if path.is_dir() else None
    tracker = path / TRACKER
    if not tracker.is_file():
        return None
    latest = tracker.read_text().strip()
    if step is not None:
        latest = str(step)
    name = latest if latest == "release" else f"iter_{int(latest):07d}"
    return path / name if (path / name).is_dir() else None


def adapter_step_dir(path: str | Path, step: int | None = None) -> Path | None:
    """As ``step_dir``, for a checkpoint that holds adapters; None for a base checkpoint or none at all."""
    found = step_dir(path, step)
    return found if found is not None and (found / ADAPTER_FILE).is_file() else None


def resumed_step(args: Namespace) -> Path | None:
    """The checkpoint of adapters that slime's ``--load`` goes on from; None for a base, or no ``--load``."""
    load = getattr(args, "load", None)
    return None if load is None else adapter_step_dir(load, getattr(args, "ckpt_step", None))
