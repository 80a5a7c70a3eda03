"""Starting ``slime-lora rehearse`` as a user does, and finding every process that came of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

_MARK = "SLIME_LORA_TEST_RUN"
TINY = ["--steps", "2", "--rollout-batch-size", "8", "--n-samples-per-prompt", "4"]


class Rehearsal:
    """One run. A context manager: leaves no process, whatever the test does."""

    def __init__(self, out: Path, cache: Path, *flags: str):
        self.mark, self.out = uuid.uuid4().hex, out
        self.log = out.with_name(out.name + ".log")
        # Inherited by every process of the run, however it detaches itself: it cannot get lost as a parent can.
        env = {**os.environ, _MARK: self.mark, "XDG_CACHE_HOME": str(cache), "PYTHONUNBUFFERED": "1"}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "slime_plugins.lora", "rehearse", "--out", str(out), *flags],
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group of its own, as a shell gives it: Ctrl-C goes to all of it
            )

    def wait(self, timeout: float = 240) -> tuple[int, str]:
        """Exit code and everything that was printed. The time is for the slowest of machines, not a measure."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s:\n{self.log.read_text()}") from None
        return code, self.log.read_text()

    def wait_for(self, text: str, timeout: float = 180) -> None:
        """Until ``text`` has been printed."""
        deadline = time.monotonic() + timeout
        while text not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, f"no {text!r} in {timeout} s:\n{self.log.read_text()}"
            time.sleep(0.1)

    def ctrl_c(self) -> None:
        """As a terminal sends it: to the whole foreground process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def terminate(self) -> None:
        """As ``kill`` and a cluster's scheduler send it: to the one process."""
        self.process.terminate()

    def wait_for_processes(self, text: str, timeout: float = 60) -> None:
        """Until one whose command line holds ``text`` lives."""
        deadline = time.monotonic() + timeout
        while not any(text in command for command in self.processes().values()):
            assert time.monotonic() < deadline, f"no process {text!r} in {timeout} s:\n{self.log.read_text()}"
            time.sleep(0.05)

    def processes(self, variable: str | None = None) -> dict[int, str]:
        """Living processes of this run: pid -> command line. Or those of them that have ``variable`` as well."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    environ = (entry / "environ").read_bytes().split(b"\0")
                    names = {name.partition(b"=")[0].decode() for name in environ}
                    if f"{_MARK}={self.mark}".encode() in environ and (variable is None or variable in names):
                        found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def orphans(self, patience: float = 15) -> dict[int, str]:
        """Processes that are left, after the time that the last ones may take to exit."""
        deadline = time.monotonic() + patience
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.2)
        return self.processes()

    def __enter__(self) -> Rehearsal:
        return self

    def __exit__(self, *exc) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
