"""Ends what a run has started if the run itself is killed, kill -9 included. Linux.

A process of its own, so it is a script that imports nothing of ours: it waits until the pipe from the run closes, and
unless the run said goodbye, ends every process that carries the run's mark in its environment, and removes its
temporary directory. Ray's own processes mostly notice by themselves that their parent has gone; its agents not always.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

_MARK = "SLIME_LORA_RUN"
_GOODBYE = b"."
_PATIENCE_S = 5.0
"""For processes that end by themselves, and in order."""
_KEEP_ENVIRON = {"SPT_NOENV": "1"}
"""Ray's agents name themselves with setproctitle, which writes over the first kilobyte of their environment, with or
without the mark in it, unless this is set (setproctitle's README)."""


@contextlib.contextmanager
def watching(temporary: str) -> Iterator[None]:
    """Inside, processes that are started belong to this run and end with it, at the latest seconds after."""
    mark = uuid.uuid4().hex
    command = [sys.executable, "-I", "-S", __file__, mark, temporary]
    # A session of its own: Ctrl-C in a terminal goes to all processes of the foreground group.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, cwd="/")
    try:
        with environment({_MARK: mark, **_KEEP_ENVIRON}):
            yield
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.communicate(_GOODBYE)


@contextlib.contextmanager
def environment(changes: dict[str, str]) -> Iterator[None]:
    """Inside, these variables are set, and inherited by what is started; afterwards they are as they were."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _marked(mark: str) -> list[int]:
    """Living processes with this mark."""
    found = []
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else []:
        with contextlib.suppress(OSError, ValueError):
            with open(f"/proc/{entry}/environ", "rb") as environ:
                if f"{_MARK}={mark}".encode() in environ.read().split(b"\0"):
                    found.append(int(entry))
    return found


def _reap(mark: str, temporary: str) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while _marked(mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    # Again: what is being killed may be starting another one. Twice: a process has no environment while it is in exec.
    seen_none = 0
    while seen_none < 2:
        pids = _marked(mark)
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        seen_none = 0 if pids else seen_none + 1
        time.sleep(0.2)
    shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    if sys.stdin.buffer.read() != _GOODBYE:
        _reap(sys.argv[1], sys.argv[2])
