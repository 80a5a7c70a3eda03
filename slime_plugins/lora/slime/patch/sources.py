"""Files of a checkout that the edits go into: read, or the reason why not; written all or none. Stdlib only."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

_TEMPORARY = ".slime-lora.tmp"
"""Ends the name of a file on its way to its place; both verbs remove what a killed one left of them."""


def reason_against(root: Path, path: str) -> str | None:
    """Why the file ``path`` of the checkout ``root`` cannot be edited; None if it can."""
    try:
        mode = os.stat(root / path).st_mode
    except FileNotFoundError:
        return "a link that leads nowhere" if os.path.islink(root / path) else "no such file"
    except OSError as error:
        return error.strerror
    if not stat.S_ISREG(mode):
        return "not a regular file"
    if not is_inside(root, root / path):
        return f"lies outside the checkout, at {os.path.realpath(root / path)}"
    if not os.access(root / path, os.R_OK):
        return "cannot be read: permission denied"
    return None


def reason_against_writing(root: Path, changes: dict[str, tuple[bytes, bytes]]) -> str | None:
    """Which of the files that would change (see ``write``) are read-only; None if none is."""
    pending = [root / path for path, (now, new) in changes.items() if now != new]
    # The mode too: root may write everything, and should not.
    locked = [str(path) for path in pending if not path.stat().st_mode & 0o222 or not os.access(path, os.W_OK)]
    return f"read-only: {', '.join(locked)}; chmod u+w first" if locked else None


def is_inside(root: Path, path: Path) -> bool:
    """Does ``path``, its links followed, lie in the directory ``root``?"""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def shared(root: Path, paths: Iterable[str]) -> tuple[str, str] | None:
    """Two of ``paths`` that are one file by a link, if there are any: an edit of one would undo the other's."""
    seen: dict[str, str] = {}
    for path in paths:
        real = os.path.realpath(root / path)
        if real in seen:
            return seen[real], path
        seen[real] = path
    return None


def read(root: Path, path: str) -> str:
    """The text, bytes that are no UTF-8 as surrogates: ``encode`` gives back every byte."""
    return (root / path).read_bytes().decode("utf-8", "surrogateescape")


def encode(text: str) -> bytes:
    """The bytes that ``read`` read."""
    return text.encode("utf-8", "surrogateescape")


def write(changes: dict[str, tuple[bytes, bytes]], root: Path, verb: str) -> list[str]:
    """Replace files whole, all or none; a link stays, what it points to is replaced.

    Args:
        changes: path -> (as it is, as it shall be).
        verb: for what is returned: "edited slime/a.py", a line for each file that changed.
    Raises:
        OSError: a file could not be written; all are as they were.
    """
    pending = {path: pair for path, pair in changes.items() if pair[0] != pair[1]}
    places = {path: Path(os.path.realpath(root / path)) for path in pending}
    written: list[str] = []
    try:
        for path, place in places.items():
            _stage(place, pending[path][1])
        for path, place in places.items():
            os.replace(_temporary(place), place)
            written.append(path)
    except BaseException:  # Ctrl-C too
        for path in written:
            _stage(places[path], pending[path][0])
            os.replace(_temporary(places[path]), places[path])
        raise
    finally:
        remove_leftovers(root, pending)
    return [f"{verb} {path}" for path in written]


def remove_leftovers(root: Path, paths: Iterable[str]) -> None:
    """Delete the temporary files of a ``write`` that was killed."""
    for path in paths:
        for place in (root / path, Path(os.path.realpath(root / path))):
            if is_inside(root, place.parent):
                _temporary(place).unlink(missing_ok=True)


def _temporary(place: Path) -> Path:
    return place.with_name(place.name + _TEMPORARY)


def _stage(place: Path, content: bytes) -> None:
    temporary = _temporary(place)
    temporary.unlink(missing_ok=True)
    with open(temporary, "xb") as file:
        file.write(content)
        with contextlib.suppress(PermissionError):  # root keeps the owner; others own what they wrote, as editors do
            os.chown(file.fileno(), place.stat().st_uid, place.stat().st_gid)
    shutil.copymode(place, temporary)
