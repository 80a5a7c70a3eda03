"""What is worth keeping between commands: made checkpoints, and what was computed from large files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slime_plugins.lora.files.json_text import parse_json
from slime_plugins.lora.files.regular import open_regular, read_small

_VERSION = 1
_RECENT = 2.0  # seconds: a file changed later than this may change again within the same tick of the clock


def cache_dir() -> Path:
    """``$XDG_CACHE_HOME/slime-lora`` or ``~/.cache/slime-lora``. It may not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slime-lora"


class FileNote:
    """A value computed from one file, kept as long as the file is the same: path, device, inode, size, both times.

    A note is believed only if it is ours, whole and about this very file; else it is computed again. A cache that
    cannot be written costs time, nothing else.
    """

    def __init__(self, path: Path, kind: str):
        with open_regular(path) as file:
            found = os.fstat(file.fileno())
        self._about = [
            _VERSION, kind, os.path.realpath(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns,
            found.st_ctime_ns,
        ]  # fmt: skip
        self._settled = time.time() - max(found.st_mtime, found.st_ctime) > _RECENT
        name = hashlib.sha256(json.dumps([kind, self._about[2]]).encode()).hexdigest()[:32]
        self._place = cache_dir() / "files" / f"{name}.json"

    def read(self) -> Any:
        """The value; None if there is none to believe."""
        try:
            if os.stat(self._place).st_uid != os.geteuid():
                return None
            note = parse_json(read_small(self._place))
        except (OSError, ValueError):
            return None
        if not isinstance(note, dict) or note.get("about") != self._about:
            return None
        return note.get("value") if note.get("sha256") == _digest(self._about, note.get("value")) else None

    def write(self, value: Any) -> None:
        """Keep a value, unless the file has only just been written."""
        if not self._settled:
            return
        note = {"about": self._about, "sha256": _digest(self._about, value), "value": value}
        with contextlib.suppress(OSError):
            self._place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            fd, unfinished = tempfile.mkstemp(dir=self._place.parent)
            with os.fdopen(fd, "w") as file:
                json.dump(note, file)
            os.replace(unfinished, self._place)


def _digest(about: Sequence[Any], value: Any) -> str:
    return hashlib.sha256(json.dumps([about, value], sort_keys=True).encode()).hexdigest()
