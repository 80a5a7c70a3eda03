"""Files of ``torch.save`` from anyone: nothing in them is executed, nothing damaged in them is used.

A ``torch.save`` file is a zip archive: a pickle and one record per storage, each with a CRC-32 (all zero if the
writer switched them off). Tensors are mapped from the file, not read; ``torch.load`` does not look at the checksums,
so ``checked`` does, for the records in use.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from slime_plugins.lora.files.regular import open_regular

_CHUNK = 64 << 20  # bytes looked at in one go


class _Inert:
    """Stands for a class that a file names and that is not needed: it keeps what it is given and does nothing."""

    def __init__(self, *args, **kwargs):
        self.args = args


# Modules whose classes may be named by a file and are then replaced by _Inert. All others are refused.
_HARMLESS = ("deepspeed.", "transformers.", "accelerate.", "trl.", "argparse.Namespace", "pathlib.")

# What zipfile, zlib and torch.load raise on bytes that are not what they should be.
_DAMAGE = (RuntimeError, EOFError, LookupError, TypeError, AttributeError, OverflowError, pickle.UnpicklingError)
_DAMAGE += (NotImplementedError, struct.error, zlib.error, UnicodeError, AssertionError, MemoryError)

_DEPTH, _LARGEST = 64, 5_000_000
"""Of the values in a file beside its tensors: levels of nesting, and how many there are when all is written out."""
_PICKLE = b"\x80"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")


class TorchFile:
    """What one ``torch.save`` file holds: ``.value``, with its tensors mapped from the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a whole ``torch.save`` file, or it wants code to run.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._crcs: dict[int, set[int]] = {}  # bytes of a record -> its possible checksums
        with self._reasons():
            with open_regular(self.path) as file, zipfile.ZipFile(file) as archive:
                records = archive.infolist()
                _refuse_bombs(self.path, os.fstat(file.fileno()).st_size, records)
                self.has_checksums = any(record.CRC for record in records)
                for record in records:
                    if self.has_checksums and "/data/" not in record.filename:
                        archive.read(record)  # the pickle and a few bytes more; zipfile compares the CRC
                    self._crcs.setdefault(record.file_size, set()).add(record.CRC)
            stubs = self._stubs()
            with torch.serialization.safe_globals(stubs):
                self.value: Any = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            _measure(self.value, 0, {})

    def checked(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` (of this file), after comparing the bytes of its whole storage with the archive's checksums.

        Raises ValueError where they differ, and for a tensor that has not a value in the file for every element.
        """
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise ValueError(f"{self.path}: holds a tensor that is not plain values on the CPU")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{self.path}: a tensor of shape {list(tensor.shape)} repeats the few values it has")
        if not self.has_checksums:
            return tensor
        storage = tensor.untyped_storage()
        data = memoryview(torch.empty(0, dtype=torch.uint8).set_(storage).numpy())
        crc = 0
        for start in range(0, len(data), _CHUNK):
            crc = zlib.crc32(data[start : start + _CHUNK], crc)
        if crc not in self._crcs.get(len(data), ()):
            raise ValueError(f"{self.path}: checksum mismatch in tensor data, the file is damaged: copy it again")
        return tensor

    def _stubs(self) -> list[tuple[type, str]]:
        """An inert class for every harmless one that the file names. Raises ValueError for any other."""
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(self.path)
        refused = sorted(name for name in wanted if not name.startswith(_HARMLESS))
        if refused:
            raise ValueError(
                f"{self.path}: refused, loading it would call {', '.join(refused)}: only tensors and plain values "
                "are loaded, never code"
            )
        return [(type(name.rpartition(".")[2], (_Inert,), {}), name) for name in wanted]

    @contextmanager
    def _reasons(self) -> Iterator[None]:
        try:
            yield
        except zipfile.BadZipFile as error:
            if _is_legacy(self.path):
                raise ValueError(
                    f"{self.path}: is in the format of torch before 1.6, which is not read: load it there with "
                    "weights_only=True and save it again"
                ) from error
            size = self.path.stat().st_size
            message = f"{self.path}: not a whole torch.save file ({error}; {size} bytes): truncated or damaged"
            raise ValueError(message) from error
        except ValueError as error:
            if str(error).startswith(str(self.path)):
                raise
            raise ValueError(f"{self.path}: cannot be loaded as plain tensors: {error}") from error
        except _DAMAGE as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{self.path}: cannot be loaded as plain tensors: {reason}") from error


def load_plain(data: bytes, what: str) -> Any:
    """The value in the bytes of a whole ``torch.save`` file. Raises ValueError, starting with ``what``."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _refuse_bombs(what, len(data), archive.infolist())
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, *_DAMAGE) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{what}: cannot be loaded as plain tensors: {reason}") from error


def _refuse_bombs(path: Path | str, size: int, records: list[zipfile.ZipInfo]) -> None:
    """``torch.save`` stores; what is compressed, or overlaps, is larger unpacked than anybody expects."""
    packed = [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise ValueError(f"{path}: {packed[0]!r:.80} in it is compressed, which torch.save does not do: not unpacked")
    if sum(record.file_size for record in records) > size:
        raise ValueError(f"{path}: its records together are larger than the file ({size} bytes): damaged")


def _is_legacy(path: Path) -> bool:
    with open_regular(path) as file:
        start = file.read(32)
    return start.startswith(_PICKLE) and _LEGACY_MAGIC in start


def _measure(value: Any, depth: int, known: dict[int, int]) -> int:
    """Number of values inside, each as often as it is reached. Raises ValueError for what nobody saves."""
    if depth > _DEPTH:
        raise ValueError(f"its values are nested deeper than {_DEPTH} levels")
    if id(value) in known:
        return known[id(value)]
    inside: list[Any] = []
    if isinstance(value, Mapping):
        inside = [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)) and not isinstance(value, torch.Size):
        inside = list(value)
    elif isinstance(value, _Inert):
        inside = list(vars(value).values())
    count = 1
    for one in inside:
        count += _measure(one, depth + 1, known)
        if count > _LARGEST:
            raise ValueError("its values refer to each other so often that they cannot be written out")
    known[id(value)] = count
    return count
