"""Where checkpoints of one run lie, and how one appears: whole, or not at all.

    DIR/latest_checkpointed_iteration.txt      10
    DIR/iter_0000005/  DIR/iter_0000010/       complete checkpoints, Megatron's and slime's names
    DIR/release/                               one without a step: an imported adapter
    DIR/.iter_0000015.tmp-8a6f01/              being written, or left by a writer that was killed

A checkpoint is written under a name that nobody looks for, forced to disk, renamed, and only then named in
``latest_checkpointed_iteration.txt``.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path

from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.files.atomic import flush_tree, fsync, move_in
from slime_plugins.lora.files.regular import read_small

TRACKER = "latest_checkpointed_iteration.txt"
ADAPTER_JSON = "adapter.json"
_RELEASE = "release"
_NAME = re.compile(r"iter_(\d{7,})|release")


def name_of(step: int | None) -> str:
    """``iter_0000010``; ``release`` for None."""
    return _RELEASE if step is None else f"iter_{step:07d}"


def find(path: str | os.PathLike) -> Path:
    """The checkpoint that a path means: itself, or the latest one of a run's directory.

    Raises:
        UsageError: there is nothing of the kind.
        ValueError: ``latest_checkpointed_iteration.txt`` is damaged or names a checkpoint that is not there.
    """
    path = Path(path)
    if (path / ADAPTER_JSON).is_file():
        return path
    tracker = path / TRACKER
    published = list_published(path)
    if not tracker.is_file():
        if published:
            names = ", ".join(p.name for p in published)
            raise ValueError(
                f"{path} has no {TRACKER}, so which checkpoint is the latest is not known; name one: {names}"
            )
        raise UsageError(f"{path} is no adapter checkpoint: it has neither {ADAPTER_JSON} nor {TRACKER}")
    text = read_small(tracker, 1000).decode("ascii", errors="replace")
    word = text.strip()
    if not (word.isdecimal() and word.isascii()) and word != _RELEASE:
        raise ValueError(f"{tracker} is damaged: it holds {text!r}, expected a number or 'release'")
    step = None if word == _RELEASE else int(word)
    if not text.endswith("\n"):  # Megatron writes none; then "1" may be what is left of "10"
        longer = [p.name for p in published if p.name != name_of(step) and str(_step(p)).startswith(word)]
        if longer:
            raise ValueError(f"{tracker} holds {word!r} without a newline, which may be cut from {', '.join(longer)}")
    found = path / name_of(step)
    if not (found / ADAPTER_JSON).is_file():
        there = ", ".join(p.name for p in published) or "none"
        raise ValueError(f"{tracker} names {found.name}, which is no adapter checkpoint; complete ones there: {there}")
    return found


def list_published(root: Path) -> list[Path]:
    """Complete checkpoints of a run's directory, by step, ``release`` first."""
    if not root.is_dir():
        return []
    found = [p for p in root.iterdir() if _NAME.fullmatch(p.name) and (p / ADAPTER_JSON).is_file()]
    steps = {p: _step(p) for p in found}
    return sorted(found, key=lambda p: -1 if (step := steps[p]) is None else step)


def _step(path: Path) -> int | None:
    return None if path.name == _RELEASE else int(path.name.removeprefix("iter_"))


def stage(root: str | os.PathLike, step: int | None) -> Path:
    """A new, empty directory to write the checkpoint of ``step`` into. Removes what killed writers left.

    One writer per run directory at a time. The name is random: a writer that outlived its killed parent must not
    write into a later checkpoint.

    Raises:
        ValueError: the place of this checkpoint is taken by something that is not one.
    """
    root = Path(os.path.abspath(root))
    root.mkdir(parents=True, exist_ok=True)
    target = root / name_of(step)
    if target.exists() and not (target / ADAPTER_JSON).is_file():
        raise ValueError(f"{target} exists and is no adapter checkpoint; not overwritten, save elsewhere or move it")
    for leftover in root.iterdir():
        match = re.fullmatch(r"\.(iter_\d{7,}|release)\.(old|tmp-\w+)", leftover.name)
        if not match:
            continue
        if match[2] == "old" and not (root / match[1]).exists():
            os.rename(leftover, root / match[1])  # killed between the two renames of ``move_in``
        else:
            shutil.rmtree(leftover)
    staged = root / f".{name_of(step)}.tmp-{secrets.token_hex(4)}"
    os.mkdir(staged)
    return staged


def publish(staged: Path) -> Path:
    """Give a staged, complete checkpoint its name, then point ``latest`` to it. Returns the new place."""
    name = staged.name.removeprefix(".").partition(".")[0]
    root = staged.parent
    target, old = root / name, root / f".{name}.old"
    flush_tree(staged)
    move_in(staged, target, old)
    fsync(root)
    _write_tracker(root, name)
    shutil.rmtree(staged, ignore_errors=True)  # after an exchange of names these are the replaced files
    shutil.rmtree(old, ignore_errors=True)
    return target


def discard(staged: Path) -> None:
    """Remove a staged directory whose checkpoint failed."""
    shutil.rmtree(staged, ignore_errors=True)


def _write_tracker(root: Path, name: str) -> None:
    tracker = root / TRACKER
    new = root / f".{TRACKER}.tmp"
    new.write_text(f"{_step(Path(name)) if name != _RELEASE else name}\n")
    fsync(new)
    os.replace(new, tracker)
    fsync(root)
