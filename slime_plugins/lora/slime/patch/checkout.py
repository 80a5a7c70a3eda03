"""Put the plugin into a slime checkout and take it out again: the edits of ``seams`` and ``slime_plugins/lora``."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.slime.patch.edits import MissingSeamError, insert, is_ours, parse, strip
from slime_plugins.lora.slime.patch.seams import SEAMS, Seam

PLUGIN = Path("slime_plugins") / "lora"
COPY_MARK = ".slime-lora-copy.json"
"""In a copied plugin: what was copied, so that revert can tell ours from somebody's changes."""


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
    def applied(self) -> bool:
        """Is every edit in place, as this version of the plugin would make it?"""
        return bool(self.files) and all(now == edited for now, _, edited in self.files.values())

    @property
    def touched(self) -> bool:
        """Is any line of ours in the checkout?"""
        return any(now != clean for now, clean, _ in self.files.values())


def plan(slime_dir: str | os.PathLike) -> Plan:
    """Look for every seam of a checkout.

    Raises:
        UsageError: not a slime checkout.
    """
    root = Path(slime_dir).resolve()
    for name in ("slime/utils/arguments.py", "slime_plugins"):
        if not (root / name).exists():
            raise UsageError(f"{slime_dir} is not a slime checkout: it has no {name}")
    sources, chosen, problems, absent = {}, {}, {}, []
    for seam in SEAMS:
        edits = list(seam.edits)
        if seam.optional and not all((root / path).is_file() for path, _ in edits):
            absent.append(seam.name)
            continue
        reasons = []
        for path, edit in edits:
            reason = _reason_against(root, path, edit, sources)
            if reason:
                reasons.append(f"{path}: {reason}")
            elif not (seam.either and _is_chosen(seam, chosen)):
                chosen.setdefault(path, []).append((seam.name, edit))
        if (seam.either and len(reasons) == len(edits)) or (not seam.either and reasons):
            problems[seam.name] = "; ".join(reasons)
    files = {}
    if not problems:
        for path, edits in sorted(chosen.items()):
            now = (root / path).read_bytes()
            edited = insert(sources[path], [edit for _, edit in edits])
            files[path] = (now, sources[path].encode(), edited.encode())
    return Plan(root, files, problems, tuple(absent))


def apply(made: Plan, *, copy: bool = False) -> list[str]:
    """Write the edits and put the plugin in place. Returns what was done, a line each; nothing if all was there.

    Raises:
        ValueError: a seam is missing, or something else lies at ``slime_plugins/lora``. Nothing has been written.
        OSError: a file could not be written; those written before it have been put back.
    """
    _refuse_missing(made)
    target = made.root / PLUGIN
    state = plugin_state(made.root)
    if state == "foreign":
        raise ValueError(f"{target} is neither a link to this plugin nor a copy made by it; move it away")
    if state == "running":
        raise ValueError(f"slime-lora runs from {target} itself; run the one that is installed elsewhere")
    done = _write({path: (now, edited) for path, (now, _, edited) in made.files.items()}, made.root, "edited")
    wanted = "copy" if copy else "link"
    if state != wanted or (copy and _changed_since_copy(target, package_dir())):
        try:
            _remove_plugin(target, state)
            _put_plugin(target, copy)
        except OSError:
            _write({path: (edited, now) for path, (now, _, edited) in made.files.items()}, made.root, "put back")
            raise
        done.append(f"{'copied' if copy else 'linked'} {PLUGIN}")
    return done


def revert(slime_dir: str | os.PathLike, *, force: bool = False) -> list[str]:
    """Take our lines and the plugin out of a checkout. Returns what was done, a line each; nothing if none was there.

    Works on a checkout whose seams have moved since: it deletes marked lines, wherever they are.

    Raises:
        ValueError: a copied plugin has been changed in the checkout, and not ``force``. Nothing has been written.
    """
    root = Path(slime_dir).resolve()
    target = root / PLUGIN
    state = plugin_state(root)
    if state == "copy" and not force:
        changed = _changed_since_copy(target, None)
        if changed:
            raise ValueError(
                f"{target} has been changed since it was copied ({', '.join(changed)}); keep it, or --force"
            )
    changes = {}
    for path in sorted({path for seam in SEAMS for path, _ in seam.edits}):
        if (root / path).is_file():
            now = (root / path).read_bytes()
            changes[path] = (now, strip(now.decode()).encode())
    done = _write(changes, root, "restored")
    if state in ("link", "copy"):
        _remove_plugin(target, state)
        done.append(f"removed {PLUGIN}")
    return done


def diff(made: Plan) -> str:
    """The edits as a patch for ``git apply``, with one line of context. Raises ValueError if a seam is missing."""
    _refuse_missing(made)
    pieces = []
    for path, (_, _, edited) in made.files.items():
        pieces.append(f"diff --git a/{path} b/{path}\n--- a/{path}\n+++ b/{path}\n")
        pieces.extend(_hunks(edited.decode().splitlines(keepends=True)))
    return "".join(pieces)


def dirty_files(root: Path) -> list[str]:
    """Tracked files of a git checkout that differ from its commit in more than our lines; [] outside git."""
    status = _git(root, "status", "--porcelain", "--untracked-files=no", "-z")
    if status is None:
        return []
    dirty = []
    for entry in filter(None, status.decode().split("\0")):
        path = entry[3:]
        committed = _git(root, "show", f"HEAD:{path}")
        try:
            clean = strip((root / path).read_bytes().decode()).encode()
        except (OSError, UnicodeDecodeError):
            clean = None
        if clean is None or clean != committed:
            dirty.append(path)
    return dirty


def plugin_state(root: Path) -> str:
    """What lies at ``slime_plugins/lora``: absent, link, copy, running (the plugin in use is this one) or foreign."""
    target = root / PLUGIN
    if target.is_symlink():
        ours = target.resolve() == package_dir() or not target.exists()
        return "link" if ours or any((target / "slime").rglob("seams.py")) else "foreign"
    if not target.exists():
        return "absent"
    if target.resolve() == package_dir() and not (target / COPY_MARK).is_file():
        return "running"
    return "copy" if (target / COPY_MARK).is_file() else "foreign"


def package_dir() -> Path:
    """The directory of the ``slime_plugins.lora`` that runs."""
    return Path(__file__).resolve().parents[2]


def _hunks(lines: list[str]) -> Iterable[str]:
    """Unified hunks that insert the marked ones of ``lines``. Not difflib, which may move blank lines around."""
    ours = [is_ours(line) for line in lines]
    shown = [any(ours[max(i - 1, 0) : i + 2]) for i in range(len(lines))]
    before = 1  # line number in the file without our lines
    for i, line in enumerate(lines):
        if shown[i] and not (i and shown[i - 1]):
            end = next((j for j in range(i, len(lines)) if not shown[j]), len(lines))
            added = sum(ours[i:end])
            yield f"@@ -{before},{end - i - added} +{i + 1},{end - i} @@\n"
        if shown[i]:
            yield f"{'+' if ours[i] else ' '}{line}"
        before += not ours[i]


def _reason_against(root: Path, path: str, edit, sources: dict[str, str]) -> str | None:
    if path not in sources:
        try:
            sources[path] = strip((root / path).read_bytes().decode())
        except FileNotFoundError:
            return "no such file"
        except UnicodeDecodeError:
            return "not UTF-8"
    try:
        edit.place(parse(sources[path]))
        insert(sources[path], [edit])
    except SyntaxError as error:
        return f"not Python: {error}"
    except MissingSeamError as error:
        return str(error)
    return None


def _is_chosen(seam: Seam, chosen: dict[str, list]) -> bool:
    return any(name == seam.name for edits in chosen.values() for name, _ in edits)


def _refuse_missing(made: Plan) -> None:
    if made.problems:
        missing = "; ".join(f"{seam}: {reason}" for seam, reason in made.problems.items())
        raise ValueError(f"{made.root} is a slime that this plugin does not know: no seam for {missing}")


def _write(changes: dict[str, tuple[bytes, bytes]], root: Path, verb: str) -> list[str]:
    """Replace files whole, all or none. ``changes``: path -> (as it is, as it shall be)."""
    pending = {path: pair for path, pair in changes.items() if pair[0] != pair[1]}
    written = []
    try:
        for path, (_, new) in pending.items():
            _replace(root / path, new)
            written.append(path)
    except OSError:
        for path in written:
            _replace(root / path, pending[path][0])
        raise
    return [f"{verb} {path}" for path in written]


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".slime-lora.tmp")
    try:
        temporary.write_bytes(content)
        shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _put_plugin(target: Path, copy: bool) -> None:
    if not copy:
        target.symlink_to(package_dir(), target_is_directory=True)
        return
    shutil.copytree(package_dir(), target, ignore=shutil.ignore_patterns("__pycache__", COPY_MARK))
    (target / COPY_MARK).write_text(json.dumps(_hashes(target), indent=0, sort_keys=True))


def _remove_plugin(target: Path, state: str) -> None:
    if state == "link":
        target.unlink()
    elif state == "copy":
        shutil.rmtree(target)


def _changed_since_copy(target: Path, source: Path | None) -> list[str]:
    """Files of a copy that are not as they were copied (or, with ``source``, not as they are there)."""
    wanted = _hashes(source) if source else json.loads((target / COPY_MARK).read_text())
    have = _hashes(target)
    return sorted(path for path in wanted.keys() | have.keys() if wanted.get(path) != have.get(path))


def _hashes(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in _files(directory)
        if path.name != COPY_MARK
    }


def _files(directory: Path) -> Iterable[Path]:
    return (path for path in directory.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def _git(root: Path, *command: str) -> bytes | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None
