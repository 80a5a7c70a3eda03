"""The last steps of every checkpoint, in one process: index, what is not sharded, ``adapter.json``, the name."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from slime_plugins.lora.checkpoint import directory, storage
from slime_plugins.lora.checkpoint.manifest import Manifest
from slime_plugins.lora.files.atomic import naming

COMMON = "common.pt"
"""Scheduler, random states and optimizer scalars, under Megatron's name for what is not sharded."""


def pack_common(
    *, step: int | None = None, scheduler: Mapping | None = None, scalars: Mapping | None = None, rng: Any = None
) -> bytes:
    """Content of ``common.pt``. Raises ValueError for a state that could not be read back without executing it."""
    content = {"iteration": step or 0, "scheduler": scheduler, "optimizer_scalars": dict(scalars or {}), "rng": rng}
    buffer = io.BytesIO()
    try:
        torch.save(content, buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError) as error:
        raise ValueError("the scheduler's state holds more than numbers, strings and tensors") from error
    return buffer.getvalue()


def read_common(path: Path) -> dict[str, Any]:
    """``common.pt`` of a checkpoint, whose checksum the caller has compared."""
    return torch.load(path / COMMON, map_location="cpu", weights_only=True)


def complete(staged: Path, written: Sequence[tuple], common: bytes, manifest: Manifest) -> Path:
    """Add everything but the tensors to a staged directory and publish it. ``written``: of ``storage.write_shards``.

    Raises:
        ValueError, OSError: nothing has been published; the staged directory is gone.
    """
    try:
        with naming(staged):
            storage.finish(staged, written)
            (staged / COMMON).write_bytes(common)
            manifest.write(staged)
            return directory.publish(staged)
    except BaseException:
        directory.discard(staged)
        raise
