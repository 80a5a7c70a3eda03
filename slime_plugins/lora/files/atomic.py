"""A directory that appears whole or not at all: written beside its place, flushed to disk, moved in."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h


@contextmanager
def replaced_directory(out_dir: str | os.PathLike, *, drop: tuple[str, ...]) -> Iterator[Path]:
    """Yield an empty directory to fill; on a clean exit it takes the place of ``out_dir``, else it is removed.

    What ``out_dir`` already holds is kept (hard links, no copy), except the names in ``drop``: those are the ones
    that the caller writes anew. A reader sees the old directory or the new one, never a mixture; where the file
    system cannot exchange two names (NFS), it may see none for the time of two renames.
    One writer per directory at a time: what an earlier, killed writer left beside it is removed.
    """
    target = Path(os.path.realpath(out_dir))
    target.parent.mkdir(parents=True, exist_ok=True)
    old = target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():
        os.rename(old, target)  # a writer was killed between the two renames
    for leftover in target.parent.glob(f".{target.name}.tmp-*"):
        shutil.rmtree(leftover)
    shutil.rmtree(old, ignore_errors=True)

    new = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    os.mkdir(new)
    try:
        with naming(target):
            yield new
            _keep_others(target, new, drop)
            flush_tree(new)
            move_in(new, target, old)
    finally:
        shutil.rmtree(new, ignore_errors=True)  # after an exchange these are the old files
        shutil.rmtree(old, ignore_errors=True)
    fsync(target.parent)


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Errors of the system that name no file, as those of a full disk, name ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise


def _keep_others(target: Path, new: Path, drop: tuple[str, ...]) -> None:
    if not target.is_dir():
        return
    for entry in target.iterdir():
        if entry.name in drop or (new / entry.name).exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry, new / entry.name)


def _link(source: str | Path, place: str | Path) -> None:
    try:
        os.link(source, place, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, place, follow_symlinks=False)


def flush_tree(directory: Path) -> None:
    """Force every file and directory name below ``directory`` to disk; links are left alone."""
    for parent, _, files in os.walk(directory):
        for name in files:
            if not os.path.islink(os.path.join(parent, name)):
                fsync(Path(parent, name))
        fsync(Path(parent))


def move_in(new: Path, target: Path, old: Path) -> None:
    """Rename ``new`` to ``target``. What was there is then at ``new`` or ``old``, for the caller to remove."""
    if not target.exists() or not any(target.iterdir()):
        os.rename(new, target)
    elif not _exchange(new, target):
        os.rename(target, old)
        os.rename(new, target)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step. False where the C library or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0


def fsync(path: Path) -> None:
    """Force one file, or one directory's names, to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
