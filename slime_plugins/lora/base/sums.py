"""Two digests of every weight of a base: of its bytes, and one that sums over shards. Computed once per file.

A checksum is the sum, and the sum of squares, of a tensor's float32 bit patterns, modulo 2**64: it adds up over
pieces, whoever holds them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from slime_plugins.lora.base.checkpoint import MERGEABLE, BaseCheckpoint
from slime_plugins.lora.files.cache import FileNote
from slime_plugins.lora.files.safetensors import Stored

# Elements at a time. Halves of bit patterns are multiplied as float64, by BLAS: exact below 2**21 of them; on a CPU
# what fits its cache is 5 times faster than int64 arithmetic.
_CHUNK_CPU, _CHUNK_GPU = 1 << 15, 1 << 20
_NOTE = re.compile(r"[0-9a-f]{64}(?:[0-9a-f]{32})?")


@dataclass(frozen=True)
class Sums:
    """Of one weight."""

    sha256: str
    """Of its bytes, 64 hexadecimal digits."""
    checksum: str
    """Of its values in the dtype asked for, 32 hexadecimal digits; "" for one not held in floats of 16 to 64 bits."""


@lru_cache(maxsize=4)
def sums_of(base: BaseCheckpoint, dtype: str) -> dict[str, Sums]:
    """Sums of every weight of a base, read file by file, or remembered. As ``sums_of_files`` of all its files."""
    return sums_of_files(base, dtype, base.files)


def sums_of_files(base: BaseCheckpoint, dtype: str, files: Sequence[Path]) -> dict[str, Sums]:
    """Sums of the weights that some files of a base hold.

    Args:
        dtype: torch's name of the dtype that values are rounded to before their checksum.
    Raises:
        ValueError, OSError: a file changed while it was read.
    """
    found: dict[str, Sums] = {}
    for path in files:
        weights = {name: weight for name, weight in base.weights.items() if weight.file == path}
        note = FileNote(path, f"sums {dtype}")
        alone = all(base.coded[name].files == {path} for name in weights if name in base.coded)
        known = _believed(note.read(), weights) if alone else None
        if known is None:
            known = {name: _sums(weight, getattr(torch, dtype)) for name, weight in weights.items()}
        if alone:
            note.write({name: sums.sha256 + sums.checksum for name, sums in known.items()})
        found |= known
    return found


def _believed(value: Any, weights: Mapping[str, Stored]) -> dict[str, Sums] | None:
    """Sums as they were noted, if the note is about exactly these weights."""
    if not isinstance(value, dict) or value.keys() != weights.keys():
        return None
    if not all(isinstance(text, str) and _NOTE.fullmatch(text) for text in value.values()):
        return None
    return {name: Sums(text[:64], text[64:]) for name, text in value.items()}


def _sums(weight: Stored, dtype: torch.dtype) -> Sums:
    data = weight.bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    if weight.dtype not in MERGEABLE:
        return Sums(sha256, "")
    return Sums(sha256, digits(checksum(weight.decode(data).to(dtype))))


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """int64 [2] on the tensor's device; adds up over the pieces of a tensor."""
    total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for piece in tensor.detach().reshape(-1).split(_CHUNK_CPU if tensor.device.type == "cpu" else _CHUNK_GPU):
        bits = piece.float().view(torch.int32)  # high * 2**16 + low
        high = (bits >> 16).double()
        sum_, square = high.sum().long() << 16, high.dot(high).long() << 32
        if piece.dtype != torch.bfloat16:  # whose low halves are zero
            low = (bits & 0xFFFF).double()
            sum_ = sum_ + low.sum().long()
            square = square + (high.dot(low).long() << 17) + low.dot(low).long()
        total += torch.stack([sum_, square])
    return total


def digits(total: torch.Tensor) -> str:
    """A checksum as text: 32 hexadecimal digits."""
    return "".join(f"{value & (2**64 - 1):016x}" for value in total.tolist())


def added(checksums: list[str]) -> str:
    """The checksum of all that the given ones, as text, are of."""
    halves = ([int(text[i : i + 16], 16) for text in checksums] for i in (0, 16))
    return "".join(f"{sum(half) & (2**64 - 1):016x}" for half in halves)
