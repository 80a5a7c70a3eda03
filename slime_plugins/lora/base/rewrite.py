"""A copy of a checkpoint in which some tensors have other values, written as the bytes stream past."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.files.atomic import replaced_directory
from slime_plugins.lora.files.safetensors import Stored, header_of, size_of

_COPY_BYTES = 1 << 24
# Suffixes of weights in forms that are not rewritten, and names of an adapter beside the base: not copied.
_OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
_ADAPTER_CONFIG = "adapter_config.json"


def rewrite(
    base: BaseCheckpoint,
    out: Path,
    names: Collection[str],
    change: Callable[[str, torch.Tensor], torch.Tensor],
    inspect: Callable[[Path], None] | None = None,
    *,
    link_rest: bool = False,
) -> Counter[str]:
    """Write the copy, whole or not at all: one tensor in memory at a time.

    Files, index, tensor order, shapes and dtypes stay those of the base. The copy of one that holds codes is dense.

    Args:
        names: of the tensors that change.
        change: name, value -> the new value, of the same shape and dtype.
        inspect: called with the finished directory before it takes its place.
        link_rest: files of weights in which nothing changes are links to the base's.
    Returns:
        how files were linked -> their number.
    Raises:
        UsageError: ``out`` holds something.
        ValueError: a file that is a link to elsewhere (those of a Hugging Face cache are followed).
    """
    check_empty(out)
    links = Counter[str]()
    with replaced_directory(out, drop=()) as new:
        copy_others(base, new)
        if base.coded:
            _write_dense(base, new, names, change)
        for file in [] if base.coded else sorted(base.files):
            weights = {n: w for n, w in base.weights.items() if w.file == file and n in names}
            if link_rest and not weights:
                links[link(file, new / file.name)] += 1
                continue
            first = next(weight for weight in base.weights.values() if weight.file == file)
            with first.open() as source, open(new / file.name, "wb") as target:
                _rewrite_file(source, target, weights, change)
        if inspect is not None:
            inspect(new)
    return links


def link(file: Path, place: Path) -> str:
    """Put a file at another name without a copy, if that can be. Returns how."""
    source = os.path.realpath(file)
    for how, make in (("hard link", os.link), ("symbolic link", os.symlink)):
        try:
            make(source, place)
        except OSError:  # another file system, or one without links
            continue
        return how
    shutil.copyfile(source, place)
    return "copy"


def check_empty(out: Path) -> None:
    """Raise UsageError where something is that a new checkpoint would replace."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not empty; name another place for the new checkpoint")


def copy_others(base: BaseCheckpoint, new: Path) -> None:
    """Copy what is no weights: config, index, tokenizer. Raises ValueError for a link to elsewhere."""
    for entry in sorted(base.directory.iterdir()):
        other = entry.suffix not in _OTHER_WEIGHTS and entry.name != _ADAPTER_CONFIG
        if entry.is_file() and other and not entry.name.startswith("."):
            _check_link(entry)
            shutil.copyfile(entry, new / entry.name)


def _write_dense(base: BaseCheckpoint, new: Path, names: Collection[str], change: Callable) -> None:
    """The weights of a base that holds codes, each in the file where its codes were, and what speaks of them."""
    weight_map: dict[str, str] = {}
    for file in sorted(base.files):
        weights = {name: weight for name, weight in base.weights.items() if weight.file == file}
        weight_map |= dict.fromkeys(weights, file.name)
        with open(new / file.name, "wb") as target:
            target.write(header_of({name: (weight.dtype, weight.shape) for name, weight in weights.items()}))
            for name, weight in weights.items():
                before = weight.read()
                target.write(_bytes(name, before, change(name, before) if name in names else before))
    config = {key: value for key, value in base.config.items() if key != "quantization_config"}
    (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    index = new / "model.safetensors.index.json"
    if index.exists():
        total = sum(size_of(weight.dtype, weight.shape) for weight in base.weights.values())
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _bytes(name: str, before: torch.Tensor, after: torch.Tensor) -> memoryview:
    if after.shape != before.shape or after.dtype != before.dtype:
        raise ValueError(f"{name}: {before.dtype} {list(before.shape)} became {after.dtype} {list(after.shape)}")
    return after.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _check_link(entry: Path) -> None:
    """What is copied may be published: nothing through a link out of the directory, but into a cache's blobs."""
    target, home = Path(os.path.realpath(entry)), Path(os.path.realpath(entry.parent))
    blobs = home.parent.parent / "blobs"
    if entry.is_symlink() and not target.is_relative_to(home) and target.parent != blobs:
        raise ValueError(f"{entry} is a link to {target}, outside of the checkpoint: not copied; put the file there")


def _rewrite_file(source: BinaryIO, target: BinaryIO, weights: Mapping[str, Stored], change: Callable) -> None:
    """Copy a safetensors file, with new values in the places of these tensors."""
    for name, weight in sorted(weights.items(), key=lambda item: item[1].start):
        _copy(source, target, weight.start - source.tell())
        before = weight.read()
        target.write(_bytes(name, before, change(name, before)))
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
