"""Adapters merged into a Hugging Face checkpoint: W + scaling * B A, in float32, rounded once. Pure, no Megatron."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, Protocol

import torch

from slime_plugins.lora.base.checkpoint import MERGEABLE, BaseCheckpoint
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.files.atomic import replaced_directory
from slime_plugins.lora.files.safetensors import Stored
from slime_plugins.lora.projections import Rounding, merge

_COPY_BYTES = 1 << 24
_ROUNDED_AT_ONCE = 1 << 20  # entries: counting what is lost takes several copies of them, two in float64
# Suffixes of weights in forms that were not merged, and names of an adapter beside the base: not copied.
_OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
_ADAPTER_CONFIG = "adapter_config.json"


class Update(Protocol):
    """What is merged into one matrix: a ``Projection``, or something that reads its values when they are needed."""

    @property
    def name(self) -> str:
        """Of the linear, canonical."""

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]"""

    def update(self) -> torch.Tensor:
        """scaling * B A, float32 [out, in]."""


def merge_weight(weight: torch.Tensor, projection: Update, rounding: Rounding | None = None) -> torch.Tensor:
    """W + scaling * B A in W's dtype, [out, in]; the sum is rounded once.

    Raises:
        ValueError: shapes do not fit, or the result is not finite.
    """
    if tuple(weight.shape) != projection.shape:
        raise ValueError(
            f"{projection.name} is {list(weight.shape)} in the base, its adapter is for {list(projection.shape)}"
        )
    update, merged = projection.update(), torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    rows = max(1, _ROUNDED_AT_ONCE // weight.shape[1])
    for part in zip(weight.split(rows), update.split(rows), merged.split(rows)):
        part[2].copy_(merge(*part[:2], rounding))
        if not torch.isfinite(part[2]).all():
            raise ValueError(f"{projection.name} is not finite after merging")
    return merged


def merge_checkpoint(
    projections: Iterable[Update], hf_checkpoint: str | os.PathLike | BaseCheckpoint, out_dir: str | os.PathLike
) -> Rounding:
    """Write a copy of a base checkpoint with adapters merged in, whole or not at all.

    Files, index, tensor order and dtypes stay those of the base, so tied embeddings stay tied; adapted matrices are
    replaced one by one as the bytes stream past: one matrix in memory at a time, beside what the updates hold.

    Raises:
        UsageError: ``hf_checkpoint`` is no checkpoint, or ``out_dir`` holds something.
        ValueError: an adapter that does not fit the base, a base in a dtype that cannot be merged into, or one with a
            file that is a link to elsewhere (those of a Hugging Face cache are followed).
    """
    base, out = BaseCheckpoint.of(hf_checkpoint), Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not empty; name another place for the merged model")
    updates = {f"{base.spelled(p.name)}.weight": p for p in projections}
    for name, projection in updates.items():
        _check(name, projection, base)
    files = sorted({weight.file for weight in base.weights.values()})
    rounding = Rounding()
    with replaced_directory(out, drop=()) as new:
        for entry in sorted(base.directory.iterdir()):
            other = entry.suffix not in _OTHER_WEIGHTS and entry.name != _ADAPTER_CONFIG
            if entry.is_file() and other and not entry.name.startswith("."):
                _check_link(entry)
                shutil.copyfile(entry, new / entry.name)
        for file in files:
            weights = {name: weight for name, weight in base.weights.items() if weight.file == file}
            with next(iter(weights.values())).open() as source, open(new / file.name, "wb") as target:
                _merge_file(source, target, weights, updates, rounding)
    return rounding


def _check_link(entry: Path) -> None:
    """What is copied may be published: nothing through a link out of the directory, but into a cache's blobs."""
    target, home = Path(os.path.realpath(entry)), Path(os.path.realpath(entry.parent))
    blobs = home.parent.parent / "blobs"
    if entry.is_symlink() and not target.is_relative_to(home) and target.parent != blobs:
        raise ValueError(f"{entry} is a link to {target}, outside of the checkpoint: not copied; put the file there")


def _check(name: str, projection: Update, base: BaseCheckpoint) -> None:
    weight = base.weights.get(name)
    if weight is None or weight.shape != projection.shape:
        has = f"has {list(weight.shape)}" if weight else "has none of that name"
        raise ValueError(
            f"the adapter of {projection.name} is for a {list(projection.shape)} matrix, but {base.directory} {has}; "
            "give the checkpoint that it was trained on"
        )
    if weight.dtype not in MERGEABLE:
        raise ValueError(f"{name} is {weight.dtype} in {base.directory}; merging needs one of {', '.join(MERGEABLE)}")


def _merge_file(
    source: BinaryIO,
    target: BinaryIO,
    weights: Mapping[str, Stored],
    updates: Mapping[str, Update],
    rounding: Rounding,
) -> None:
    """Copy a safetensors file; tensors that have an update are written merged, in their places."""
    for name, weight in sorted(weights.items(), key=lambda item: item[1].start):
        if name in updates:
            _copy(source, target, weight.start - source.tell())
            merged = merge_weight(weight.read(), updates[name], rounding)
            target.write(merged.reshape(-1).view(torch.uint8).numpy().data)
            del merged  # before the next one is made
            source.seek(weight.end)
    _copy(source, target, None)


def _copy(source: BinaryIO, target: BinaryIO, count: int | None) -> None:
    """Copy ``count`` bytes, or all that are left."""
    left = count
    while left is None or left > 0:
        data = source.read(_COPY_BYTES if left is None else min(_COPY_BYTES, left))
        if not data:
            break
        target.write(data)
        left = None if left is None else left - len(data)
