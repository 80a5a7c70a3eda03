"""Files of any origin, opened only if they are files: a FIFO or a device would block, or never end."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
SMALL = 100_000_000
"""Bytes of the largest text that is read whole; safetensors has the same limit for its headers."""


def check_regular(path: str | os.PathLike) -> os.stat_result:
    """What the file system says about a regular file; links are followed. Never blocks.

    Raises:
        OSError: there is none.
        ValueError: it is a directory, a FIFO, a socket or a device.
    """
    return _refuse_others(path, os.stat(path))


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a regular file to read its bytes. Raises as ``check_regular``."""
    check_regular(path)
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _refuse_others(path, os.fstat(fd))  # what was there a moment ago may be another by now
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def read_small(path: str | os.PathLike, limit: int = SMALL) -> bytes:
    """All bytes of a regular file of at most ``limit``. Raises as ``check_regular``; ValueError for a longer one."""
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path}: has more than {limit:,} bytes, which no file of this kind needs")
    return data


def identity(found: os.stat_result) -> tuple[int, int, int, int]:
    """Device, inode, size and time of change of a file: equal as long as nobody wrote to it or replaced it."""
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _refuse_others(path: str | os.PathLike, found: os.stat_result) -> os.stat_result:
    if not stat.S_ISREG(found.st_mode):
        kind = next((what for is_kind, what in _KINDS if is_kind(found.st_mode)), "no regular file")
        raise ValueError(f"{Path(path)}: is {kind}, expected a file")
    return found
