"""Safetensors files from anyone: the whole header is judged before a byte of data is used. The one reader of them.

A file is 8 bytes of header length, the header (a JSON object: name -> dtype, shape, data_offsets), and the data of all
tensors without a gap. Torch is imported when a tensor is read, so that names and shapes cost nothing.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slime_plugins.lora.files.json_text import parse_json
from slime_plugins.lora.files.regular import SMALL, identity, open_regular

if TYPE_CHECKING:
    import torch

# Name in the header -> bits of one value, torch's name (None for one that torch has no whole bytes for).
_DTYPES: dict[str, tuple[int, str | None]] = {
    "F64": (64, "float64"),
    "F32": (32, "float32"),
    "BF16": (16, "bfloat16"),
    "F16": (16, "float16"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "F4": (4, None),
    "I64": (64, "int64"),
    "I32": (32, "int32"),
    "I16": (16, "int16"),
    "I8": (8, "int8"),
    "U64": (64, "uint64"),
    "U32": (32, "uint32"),
    "U16": (16, "uint16"),
    "U8": (8, "uint8"),
    "BOOL": (8, "bool"),
    "C64": (64, "complex64"),
}
_LARGEST = 2**63 - 1
"""What torch can count."""
_METADATA = "__metadata__"
_LFS = b"version https://git"


def torch_dtype(dtype: str) -> torch.dtype | None:
    """Of a name as safetensors writes it; None where this torch has none of that kind."""
    import torch

    return getattr(torch, _DTYPES[dtype][1] or "", None)


def size_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * _DTYPES[dtype][0] // 8


def header_of(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None) -> bytes:
    """What a file begins with whose data are these tensors, name -> dtype and shape, one after the other."""
    entries: dict[str, dict] = {_METADATA: {"format": "pt", **(metadata or {})}}
    at = 0
    for name, (dtype, shape) in tensors.items():
        end = at + size_of(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # as safetensors does, for alignment
    return struct.pack("<Q", len(text)) + text


def data_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor as a file holds them: in its own memory, if it is contiguous and on the CPU."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_tensors(
    path: str | os.PathLike,
    tensors: Mapping[str, torch.Tensor],
    data: Mapping[str, memoryview],
    metadata: Mapping[str, str],
) -> None:
    """Write a file as safetensors' own ``save_file`` does: larger values first, then by name. Raises OSError.

    Many small tensors are what it is for: ``save_file`` looks at every one for memory that it shares with others,
    which matters to nobody who reads the file.

    Args:
        data: ``data_of`` each tensor.
    """
    names = {torch_name: name for name, (_, torch_name) in _DTYPES.items()}
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    stored = {key: (names[str(tensors[key].dtype).removeprefix("torch.")], tuple(tensors[key].shape)) for key in order}
    with open(path, "wb") as file:
        file.write(header_of(stored, metadata))
        for key in order:
            file.write(data[key])


@dataclass(frozen=True)
class Stored:
    """One tensor of a file, not loaded."""

    file: Path
    identity: tuple[int, int, int, int]
    """Of the file whose header was read: see ``regular.identity``."""
    dtype: str
    """As safetensors writes it: ``BF16``, ``F32``, ``U8``, ..."""
    shape: tuple[int, ...]
    start: int
    """Byte offset in the file."""
    end: int

    def bytes(self, start: int = 0, stop: int | None = None) -> bytearray:
        """Bytes ``start`` to ``stop`` of the tensor's data.

        Raises as ``open``.
        """
        first, last = self.start + start, self.end if stop is None else min(self.end, self.start + stop)
        data = bytearray(max(last - first, 0))
        with self.open() as file:
            file.seek(first)
            if file.readinto(data) != len(data):
                raise ValueError(f"{self.file}: was cut while it was read")
        return data

    def open(self) -> BufferedReader:
        """The file, at its start. Raises OSError; ValueError if it is no longer the one whose header was read."""
        file = open_regular(self.file)
        if identity(os.fstat(file.fileno())) != self.identity:
            file.close()
            raise ValueError(f"{self.file}: was changed or replaced while it was read: try again")
        return file

    def read(self, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        """The tensor, or some of its rows and columns, on the CPU in memory of its own.

        Args:
            rows: of the first dimension, step 1; only they are read.
            columns: of the second one.
        Raises:
            OSError, ValueError: as ``open``; or a dtype that torch has not.
        """
        if rows == slice(None):
            tensor = self.decode(self.bytes())
        else:
            first, stop, _ = rows.indices(self.shape[0])
            one = math.prod(self.shape[1:]) * _DTYPES[self.dtype][0] // 8
            tensor = self.decode(self.bytes(first * one, stop * one), rows=max(stop - first, 0))
        return tensor if columns == slice(None) else tensor[:, columns].clone()

    def decode(self, data: bytearray, *, rows: int | None = None) -> torch.Tensor:
        """The tensor, or that many of its rows, whose bytes these are; it lives in ``data``."""
        import torch

        dtype = torch_dtype(self.dtype)
        if dtype is None:
            raise ValueError(f"{self.file}: holds {self.dtype} values, which this torch cannot read")
        shape = self.shape if rows is None else (rows, *self.shape[1:])
        if not data:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(shape)


@dataclass(frozen=True)
class Header:
    """What one safetensors file holds."""

    path: Path
    tensors: dict[str, Stored]
    """In the order of the header."""
    metadata: dict[str, str]


def read_header(path: str | os.PathLike) -> Header:
    """Read and judge the header of a safetensors file.

    Raises:
        OSError: no such file, or it cannot be read.
        ValueError: naming the file: not a regular file, or not one that holds exactly what its header says.
    """
    path = Path(path)
    with open_regular(path) as file:
        mark = identity(os.fstat(file.fileno()))
        size = mark[2]
        start = file.read(len(_LFS))
        try:
            if start == _LFS:
                raise ValueError("a git-lfs pointer, run `git lfs pull`")
            if len(start) < 8:
                raise ValueError("truncated or damaged (no header)")
            (length,) = struct.unpack("<Q", start[:8])
            if length > min(size - 8, SMALL):
                raise ValueError(f"truncated or damaged (its header wants {length} bytes)")
            file.seek(8)
            entries = parse_json(file.read(length))
            metadata = _metadata(entries)
            tensors = {name: _entry(path, mark, 8 + length, name, entry) for name, entry in entries.items()}
            _check_cover(tensors, 8 + length, size)
        except ValueError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({size} bytes): {error}") from error
    return Header(path, tensors, metadata)


def _metadata(entries: Any) -> dict[str, str]:
    """Take the metadata out of a header."""
    if not isinstance(entries, dict):
        raise ValueError(f"its header is a JSON {type(entries).__name__}, expected an object")
    metadata = entries.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{_METADATA} is no object of texts")
    return metadata


def _entry(path: Path, mark: tuple[int, int, int, int], base: int, name: str, entry: Any) -> Stored:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{_brief(name)} has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{_brief(name)} has dtype {_brief(dtype)}, which safetensors has not")
    if not _counts(shape) or math.prod(n or 1 for n in shape) > _LARGEST:
        raise ValueError(f"{_brief(name)} has shape {_brief(shape)}, which no tensor has")
    if not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{_brief(name)} has data_offsets {_brief(offsets)}, expected two numbers")
    bits = math.prod(shape) * _DTYPES[dtype][0]
    if bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise ValueError(
            f"{_brief(name)} has data_offsets {_brief(offsets)}, but {dtype} {_brief(shape)} takes {bits / 8:g} bytes"
        )
    return Stored(path, mark, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _check_cover(tensors: dict[str, Stored], start: int, size: int) -> None:
    """The data of all tensors, one after the other, are the rest of the file."""
    end = start
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if stored.start != end:
            raise ValueError(f"damaged: the data of {_brief(name)} leave a gap or overlap with others")
        end = stored.end
    if end != size:
        raise ValueError(f"truncated or damaged: its header describes {end} bytes")


def _counts(value: Any) -> bool:
    """A list of whole numbers, none negative, that torch can hold? A JSON ``true`` is none."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= _LARGEST for n in value)


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) < 120 else f"{text[:117]}..."
