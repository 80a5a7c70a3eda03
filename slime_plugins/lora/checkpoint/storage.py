"""Tensors of a checkpoint on disk, in the torch_dist layout of Megatron's ``dist_checkpointing``.

    __0_0.distcp ...    one file per writing rank, one ``torch.save`` record per shard
    .metadata           torch.distributed.checkpoint's index of them (a pickle), for Megatron and torch
    metadata.json       what Megatron recognises a torch_dist directory by
    tensors.json        the same index as text, with a SHA-256 for every record: the one that is read here

Megatron's own writer is not used: it starts a manager process per rank that outlives a killed trainer. Its reader
reads these files (``dist_checkpointing.load``). Nothing here unpickles: a record is loaded with ``weights_only``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter, SavePlan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from slime_plugins.lora.files.atomic import naming
from slime_plugins.lora.files.json_text import read_object
from slime_plugins.lora.files.regular import check_regular, open_regular
from slime_plugins.lora.files.torch_file import load_plain

INDEX = "tensors.json"
DCP_INDEX = ".metadata"
BACKEND = "metadata.json"
_DTYPES = ("float64", "float32", "bfloat16", "float16")
_BACKEND_JSON = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Shard:
    """A rectangle of a tensor, held by this process."""

    key: str
    data: torch.Tensor
    """On the CPU, contiguous, in storage of its own."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offset: tuple[int, ...]
    """Of this rectangle."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A shard that was written."""

    offset: list[int]
    shape: list[int]
    file: str
    start: int
    """Bytes from the start of the file."""
    bytes: int
    sha256: str


@dataclass
class Entry:
    """One tensor of the index."""

    dtype: str
    shape: list[int]
    records: list[Record] = field(default_factory=list)


class _ShardPlanner:
    """The one method that a storage writer asks of a save planner."""

    def __init__(self, data: Mapping[MetadataIndex, torch.Tensor]):
        self.resolve_data = lambda item: data[item.index]


def write_shards(directory: Path, rank: int, shards: Sequence[Shard]) -> tuple[list, dict[str, Entry]]:
    """Write this process's shards to ``__<rank>_0.distcp``, forced to disk. No communication.

    Returns:
        write results and index entries, both to be handed to ``finish`` by one process.
    """
    if not shards:
        return [], {}
    items, data = [], {}
    for shard in shards:
        index = MetadataIndex(shard.key, shard.offset)
        chunk = ChunkStorageMetadata(torch.Size(shard.offset), shard.data.shape)
        properties = TensorProperties(dtype=shard.data.dtype)
        tensor_data = TensorWriteData(chunk, properties, torch.Size(shard.shape))
        items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=tensor_data))
        data[index] = shard.data
    writer = FileSystemWriter(directory, sync_files=True)
    plan = writer.prepare_global_plan([SavePlan([])] * rank + [SavePlan(items)])[rank]
    with naming(directory):
        planner: Any = _ShardPlanner(data)
        results = writer.write_data(plan, planner).wait()
    return results, _entries(directory, shards, results)


def _entries(directory: Path, shards: Sequence[Shard], results) -> dict[str, Entry]:
    by_index = {MetadataIndex(shard.key, shard.offset): shard for shard in shards}
    entries: dict[str, Entry] = {}
    for result in results:
        shard, place = by_index[result.index], result.storage_data
        with open(directory / place.relative_path, "rb") as file:
            file.seek(place.offset)
            sha256 = hashlib.sha256(file.read(place.length)).hexdigest()
        entry = entries.setdefault(shard.key, Entry(dtype=_name(shard.data.dtype), shape=list(shard.shape)))
        entry.records.append(
            Record(
                offset=list(shard.offset),
                shape=list(shard.data.shape),
                file=place.relative_path,
                start=place.offset,
                bytes=place.length,
                sha256=sha256,
            )
        )
    return entries


def finish(directory: Path, written: Sequence[tuple[list, dict[str, Entry]]]) -> dict[str, Entry]:
    """Write the index of what every process has written, once, after checking it. Returns the index.

    Raises:
        ValueError: a tensor is not covered exactly once, or a file of another process cannot be seen from here.
    """
    index: dict[str, Entry] = {}
    for _, entries in written:
        for key, entry in entries.items():
            known = index.setdefault(key, Entry(dtype=entry.dtype, shape=entry.shape))
            known.records += entry.records
    _check_cover(index)
    _check_visible(directory, index)
    metadata = Metadata(
        {
            key: TensorStorageMetadata(
                TensorProperties(dtype=getattr(torch, entry.dtype)),
                torch.Size(entry.shape),
                [ChunkStorageMetadata(torch.Size(r.offset), torch.Size(r.shape)) for r in entry.records],
            )
            for key, entry in index.items()
        }
    )
    FileSystemWriter(directory, sync_files=True).finish(metadata, [results for results, _ in written])
    lines = (f"{json.dumps(key)}: {json.dumps(asdict(entry))}" for key, entry in sorted(index.items()))
    (directory / INDEX).write_text("{\n" + ",\n".join(lines) + "\n}\n")  # a line per tensor: small, and readable
    (directory / BACKEND).write_text(json.dumps(_BACKEND_JSON))
    return index


def _check_cover(index: Mapping[str, Entry]) -> None:
    for key, entry in index.items():
        offsets = {tuple(record.offset) for record in entry.records}
        volume = sum(math.prod(record.shape) for record in entry.records)
        if len(offsets) != len(entry.records) or volume != math.prod(entry.shape):
            raise ValueError(
                f"{key} {entry.shape} was to be written once, but {volume} elements of {math.prod(entry.shape)} were, "
                f"in {len(entry.records)} shards at {len(offsets)} places: ranks disagree about who holds what"
            )


def _check_visible(directory: Path, index: Mapping[str, Entry]) -> None:
    for name, size in _file_sizes(index).items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != size:
            raise ValueError(f"{path}, written by another rank, is not here: checkpoints need one shared file system")


def _file_sizes(index: Mapping[str, Entry]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for entry in index.values():
        for record in entry.records:
            sizes[record.file] = max(sizes.get(record.file, 0), record.start + record.bytes)
    return sizes


class TensorReader:
    """Reads rectangles of the tensors of a checkpoint; every byte that is used is compared with its checksum."""

    def __init__(self, directory: Path, index: Mapping[str, Entry]):
        self.directory = directory
        self.index = index

    @classmethod
    def open(cls, directory: Path) -> TensorReader:
        """Read the index, whose own checksum the caller has compared. Raises ValueError, OSError."""
        raw = read_object(directory / INDEX)
        try:
            index = {key: _entry(entry) for key, entry in raw.items()}
            _check_cover(index)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{directory / INDEX}: is no index of tensors: {error!r:.120}") from error
        return cls(directory, index)

    def check_files(self) -> None:
        """Raise ValueError for a data file that is missing or not as long as it was."""
        for name, size in _file_sizes(self.index).items():
            path = self.directory / name
            if not path.exists():
                raise ValueError(f"{path} is missing")
            found = check_regular(path).st_size
            if found != size:
                raise ValueError(f"{path} is truncated or damaged: {found} bytes, {size} were written")

    def read(self, key: str, offset: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> torch.Tensor:
        """A rectangle of one tensor, by default all of it, on the CPU.

        Raises:
            KeyError: no such tensor.
            ValueError: bytes are not those that were written.
        """
        entry = self.index[key]
        offset = list(offset or [0] * len(entry.shape))
        shape = list(entry.shape if shape is None else shape)
        result = torch.empty(shape, dtype=getattr(torch, entry.dtype))
        for record in entry.records:
            low = [max(a, b) for a, b in zip(offset, record.offset)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offset, shape, record.offset, record.shape)]
            if all(a < b for a, b in zip(low, high)):
                source = self._load(key, record)
                result[_box(low, high, offset)] = source[_box(low, high, record.offset)]
        return result

    def _load(self, key: str, record: Record) -> torch.Tensor:
        path = self.directory / record.file
        with open_regular(path) as file:
            file.seek(record.start)
            data = file.read(record.bytes)
        if hashlib.sha256(data).hexdigest() != record.sha256:
            raise ValueError(f"{path}: checksum mismatch in {key}: its bytes are not those that were written")
        tensor, expected = load_plain(data, f"{path}: {key}"), getattr(torch, self.index[key].dtype)
        if not isinstance(tensor, torch.Tensor) or list(tensor.shape) != record.shape or tensor.dtype != expected:
            raise ValueError(
                f"{path}: {key} is not the {self.index[key].dtype} {record.shape} that {INDEX} says it is"
            )
        return tensor


def _entry(entry: Mapping[str, Any]) -> Entry:
    """One entry of an index from anyone. Raises ValueError, KeyError, TypeError."""
    found = Entry(entry["dtype"], entry["shape"], [Record(**record) for record in entry["records"]])
    if found.dtype not in _DTYPES or not _counts(found.shape):
        raise ValueError(f"dtype {found.dtype}, shape {found.shape}")
    for record in found.records:
        inside = _counts(record.offset) and _counts(record.shape) and len(record.offset) == len(record.shape)
        inside = inside and len(record.shape) == len(found.shape)
        if not inside or any(o + n > whole for o, n, whole in zip(record.offset, record.shape, found.shape)):
            raise ValueError(f"a record at {record.offset} of shape {record.shape} in a tensor of {found.shape}")
        values = math.prod(record.shape) * getattr(torch, found.dtype).itemsize
        if not _counts([record.start, record.bytes]) or values > record.bytes:
            raise ValueError(f"a record of {record.bytes} bytes for {values}")
        if Path(record.file).name != record.file or not isinstance(record.sha256, str):
            raise ValueError(f"a record in {record.file!r}")
    return found


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**62 for n in values)


def _box(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
