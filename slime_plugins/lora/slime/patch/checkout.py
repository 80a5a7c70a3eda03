"""Put the plugin into a slime checkout and take it out again: the edits of ``seams`` and ``slime_plugins/lora``."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.slime.patch import plugin, sources
from slime_plugins.lora.slime.patch.edits import (
    Edit,
    MissingSeamError,
    NotPythonError,
    Source,
    marked_lines,
    strangers,
    strip,
)
from slime_plugins.lora.slime.patch.seams import SEAMS, Seam

PATHS = tuple(sorted({path for seam in SEAMS for path, _ in seam.edits}))
"""Every file that a slime version may have a seam in."""


@dataclass(frozen=True)
class Plan:
    """What a checkout is and what it would become. Nothing is written by making one."""

    root: Path
    files: dict[str, tuple[bytes, bytes, bytes]]
    """Path -> (as it is, without our lines, with them). Empty where a seam is missing."""
    problems: dict[str, str]
    """Seam -> where it was looked for and what is not there."""
    absent: tuple[str, ...]
    """Optional seams whose files this version does not have."""

    @property
    def changes(self) -> dict[str, tuple[bytes, bytes]]:
        """Path -> (as it is, with our lines)."""
        return {path: (now, edited) for path, (now, _, edited) in self.files.items()}

    @property
    def applied(self) -> bool:
        """Is every edit in place, as this version of the plugin would make it?"""
        return bool(self.files) and all(now == edited for now, _, edited in self.files.values())

    @property
    def touched(self) -> bool:
        """Is any line of ours in the checkout?"""
        return any(now != clean for now, clean, _ in self.files.values())


def root_of(slime_dir: str | os.PathLike) -> Path:
    """The checkout's directory, links followed. Raises UsageError if it is none."""
    if not os.fspath(slime_dir):
        raise UsageError("the slime checkout is named by an empty text; expected its directory")
    root = Path(os.path.realpath(slime_dir))
    for name, is_there in (("slime/utils/arguments.py", Path.exists), ("slime_plugins", Path.is_dir)):
        if not is_there(root / name):
            raise UsageError(f"{slime_dir} is not a slime checkout: it has no {name}")
    return root


def plan(slime_dir: str | os.PathLike) -> Plan:
    """Look for every seam of a checkout.

    Raises:
        UsageError: not a slime checkout.
    """
    root = root_of(slime_dir)
    with contextlib.suppress(MissingSeamError, NotPythonError):
        made = _plan(root, Source.draft)
        if not made.problems:
            return made  # all edits of a file have been read at once: none needs to be read alone
    return _plan(root, Source.insert)


def _plan(root: Path, attempt: Callable[[Source, Sequence[Edit]], str]) -> Plan:
    """``attempt``: what one edit has to get through. Raises what ``Source.insert`` does."""
    texts: dict[str, Source] = {}
    chosen: dict[str, list] = {}
    problems: dict[str, str] = {}
    absent = []
    for seam in SEAMS:
        if seam.optional and not all(os.path.lexists(root / path) for path, _ in seam.edits):
            absent.append(seam.name)
            continue
        reasons = []
        for path, edit in seam.edits:
            reason = _reason_against(root, path, edit, texts, attempt)
            if reason:
                reasons.append(f"{path}: {reason}")
            elif not (seam.either and _is_chosen(seam, chosen)):
                chosen.setdefault(path, []).append((seam.name, edit))
        if (seam.either and len(reasons) == len(seam.edits)) or (not seam.either and reasons):
            problems[seam.name] = "; ".join(reasons)
    same = sources.shared(root, chosen)
    if same:
        problems[chosen[same[1]][0][0]] = f"{same[1]}: is the same file as {same[0]}, through a link"
    files = {}
    if not problems:
        for path, edits in sorted(chosen.items()):
            edited = texts[path].insert([edit for _, edit in edits])
            files[path] = ((root / path).read_bytes(), sources.encode(texts[path].text), sources.encode(edited))
    return Plan(root, files, problems, tuple(absent))


def reason_against(made: Plan, *, copy: bool = False) -> str | None:
    """Why ``apply`` would refuse a checkout that has all seams; None if it would not."""
    reasons = (
        plugin.reason_against(made.root, copy=copy),
        sources.reason_against_writing(made.root, made.changes),
    )
    return "; ".join(filter(None, reasons)) or None


def apply(made: Plan, *, copy: bool = False) -> list[str]:
    """Write the edits and put the plugin in place. Returns what was done, a line each; nothing if all was there.

    Raises:
        ValueError: a seam is missing, or at ``slime_plugins/lora`` lies what is not ours to replace. Nothing has been
            written.
        OSError: a file could not be written; those written before it have been put back.
    """
    _refuse_missing(made)
    reason = reason_against(made, copy=copy)
    if reason:
        raise ValueError(reason)
    _remove_leftovers(made.root)
    done = sources.write(made.changes, made.root, "edited")
    try:
        placed = plugin.put(made.root, copy=copy)
    except BaseException:
        sources.write({path: (edited, now) for path, (now, edited) in made.changes.items()}, made.root, "put back")
        raise
    return done + ([placed] if placed else [])


def revert(slime_dir: str | os.PathLike, *, force: bool = False) -> list[str]:
    """Take our lines and the plugin out of a checkout. Returns what was done, a line each; nothing if none was there.

    Works on a checkout whose seams have moved since: it deletes marked lines, wherever they are.

    Raises:
        ValueError: a copied plugin has been changed in the checkout, and not ``force``; or a file with our lines is
            not the checkout's. Nothing has been written.
        OSError: a file could not be written; all are as they were.
    """
    root = root_of(slime_dir)
    reason = plugin.reason_to_keep(root) if plugin.state(root) == "copy" and not force else None
    if reason:
        raise ValueError(reason)
    changes: dict[str, tuple[bytes, bytes]] = {}
    for path in PATHS:
        if not (root / path).is_file() or sources.shared(root, [*changes, path]):  # one writing is enough
            continue
        now = sources.read(root, path)
        try:
            clean = strip(now)
        except NotPythonError as error:
            raise ValueError(f"{root / path}: {error}") from error
        if now != clean:
            reason = sources.reason_against(root, path)
            if reason:
                raise ValueError(f"{root / path}: {reason}")
            changes[path] = (sources.encode(now), sources.encode(clean))
    reason = sources.reason_against_writing(root, changes)
    if reason:
        raise ValueError(reason)
    _remove_leftovers(root)
    done = sources.write(changes, root, "restored")
    removed = plugin.remove(root)
    return done + ([removed] if removed else [])


def lines_left(root: Path) -> list[str]:
    """``path:line`` of lines that have our mark or name our module but are none that we insert; they stay."""
    found = []
    for path in PATHS:
        if sources.reason_against(root, path) is None:
            with contextlib.suppress(NotPythonError):  # plan and revert name it
                found += [f"{path}:{number}" for number in strangers(sources.read(root, path))]
    return found


def diff(made: Plan) -> str:
    """The edits as a patch for ``git apply``, with one line of context. Raises ValueError if a seam is missing."""
    _refuse_missing(made)
    pieces = []
    for path, (_, _, edited) in made.files.items():
        pieces.append(f"diff --git a/{path} b/{path}\n--- a/{path}\n+++ b/{path}\n")
        pieces.extend(_hunks(marked_lines(edited.decode())))
    return "".join(pieces)


def dirty_files(root: Path) -> list[str]:
    """Tracked files of a git checkout that differ from its commit in more than our lines; [] outside git.

    Paths are relative to ``root``, which may be a folder of the repository.
    """
    status = _git(root, "status", "--porcelain", "--untracked-files=no", "--no-renames", "-z", "--", ".")
    prefix = os.fsdecode(_git(root, "rev-parse", "--show-prefix") or b"").strip("\n")
    dirty = []
    for entry in filter(None, os.fsdecode(status or b"").split("\0")):
        path = entry[3:].removeprefix(prefix)
        committed = _git(root, "show", f"HEAD:{prefix}{path}")
        if sources.reason_against(root, path) or committed != _bytes_without_ours(root, path):
            dirty.append(path)
    return dirty


def _bytes_without_ours(root: Path, path: str) -> bytes | None:
    try:
        return sources.encode(strip(sources.read(root, path)))
    except NotPythonError:
        return None


def _remove_leftovers(root: Path) -> None:
    """What a killed ``apply`` or ``revert`` left beside the places of its files."""
    sources.remove_leftovers(root, PATHS)
    plugin.remove_leftovers(root)


def _hunks(lines: list[tuple[str, bool]]) -> Iterable[str]:
    """Unified hunks that insert the marked ones of ``lines``. Not difflib, which may move blank lines around."""
    ours = [marked for _, marked in lines]
    shown = [any(ours[max(i - 1, 0) : i + 2]) for i in range(len(lines))]
    before = 1  # line number in the file without our lines
    for i, (line, _) in enumerate(lines):
        if shown[i] and not (i and shown[i - 1]):
            end = next((j for j in range(i, len(lines)) if not shown[j]), len(lines))
            added = sum(ours[i:end])
            yield f"@@ -{before},{end - i - added} +{i + 1},{end - i} @@\n"
        if shown[i]:
            yield f"{'+' if ours[i] else ' '}{line}"
        before += not ours[i]


def _reason_against(
    root: Path, path: str, edit: Edit, texts: dict[str, Source], attempt: Callable[[Source, Sequence[Edit]], str]
) -> str | None:
    if path not in texts:
        reason = sources.reason_against(root, path)
        if reason:
            return reason
        text = sources.read(root, path)
        try:
            text.encode()
        except UnicodeEncodeError:
            return "not UTF-8"
        try:
            texts[path] = Source(strip(text))
        except NotPythonError as error:
            return str(error)
    try:
        attempt(texts[path], [edit])
    except (NotPythonError, MissingSeamError) as error:
        return str(error)
    return None


def _is_chosen(seam: Seam, chosen: dict[str, list]) -> bool:
    return any(name == seam.name for edits in chosen.values() for name, _ in edits)


def _refuse_missing(made: Plan) -> None:
    if made.problems:
        missing = "; ".join(f"{seam}: {reason}" for seam, reason in made.problems.items())
        raise ValueError(f"{made.root} is a slime that this plugin does not know: no seam for {missing}")


def _git(root: Path, *command: str) -> bytes | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None
