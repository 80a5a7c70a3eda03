"""Runs of real slime on the CPU harness, and what they leave."""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LORA = "--use-lora --lora-r 4 --lora-alpha 8"


@dataclass
class Run:
    """What a finished run left."""

    work: Path
    log: str
    steps: list[dict]

    def of(self, key: str) -> list[float]:
        return [step[f"train/{key}"] for step in self.steps]

    @property
    def probes(self) -> list[dict]:
        return [json.loads(text) for text in re.findall(r"PROBE (\{.*\})\s*$", self.log, re.M)]

    def received(self, pattern: str) -> list[Path]:
        return sorted((self.work / "engines").glob(f"*/{pattern}"))

    def requests(self, engine: str = "*") -> list[dict]:
        """Of the only engine, or the one of this name."""
        (file,) = (self.work / "engines").glob(f"{engine}/requests.jsonl")
        return [json.loads(line) for line in file.read_text().splitlines()]


def rollout_requests(requests: list[dict]) -> list[dict]:
    """Without the requests of one token by which a sync proves the engines."""
    found = [r for r in requests if r["endpoint"] == "generate"]
    return [r for r in found if r["payload"]["sampling_params"].get("max_new_tokens") != 1]


def loads(requests: list[dict]) -> list[str]:
    """Names of the adapters that an engine was told to load, in this order."""
    return [r["payload"]["lora_name"] for r in requests if r["endpoint"].startswith("load_lora_adapter")]


def served(requests: list[dict]) -> list[str | None]:
    """The adapter of every answer to a rollout; None is the base."""
    return [r["payload"]["lora_path"] for r in requests if r["endpoint"] == "served"]


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """One run at a time on this machine: slime takes ports from 15000 on, and looks before it binds them.

    Two at once have talked to each other's engines.
    """
    with (Path(tempfile.gettempdir()) / "slime-lora-real-run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
