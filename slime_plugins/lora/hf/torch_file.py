"""Files of ``torch.save`` from anyone: nothing in them is executed, nothing damaged in them is used.

A ``torch.save`` file is a zip archive: a pickle and one record per storage, each with a CRC-32. Tensors are mapped
from the file, not read; ``torch.load`` does not look at the checksums, so ``checked`` does, for the records in use.
"""

from __future__ import annotations

import os
import pickle
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_CHUNK = 64 << 20  # bytes looked at in one go


class _Inert:
    """Stands for a class that a file names and that is not needed: it keeps what it is given and does nothing."""

    def __init__(self, *args, **kwargs):
        self.args = args


# Modules whose classes may be named by a file and are then replaced by _Inert. All others are refused.
_HARMLESS = ("deepspeed.", "transformers.", "accelerate.", "trl.", "argparse.Namespace", "pathlib.")


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
            with zipfile.ZipFile(self.path) as archive:
                for info in archive.infolist():
                    if info.filename.endswith("/data.pkl"):
                        archive.read(info)  # zipfile compares the CRC
                    self._crcs.setdefault(info.file_size, set()).add(info.CRC)
            self._stub_harmless()
            self.value: Any = self._load()

    def checked(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` (of this file), after comparing the bytes of its whole storage with the archive's checksums."""
        storage = tensor.untyped_storage()
        data = memoryview(torch.empty(0, dtype=torch.uint8).set_(storage).numpy())
        crc = 0
        for start in range(0, len(data), _CHUNK):
            crc = zlib.crc32(data[start : start + _CHUNK], crc)
        if crc not in self._crcs.get(len(data), ()):
            raise ValueError(f"{self.path}: checksum mismatch in tensor data, the file is damaged: copy it again")
        return tensor

    def _stub_harmless(self) -> None:
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(self.path)
        refused = sorted(name for name in wanted if not name.startswith(_HARMLESS))
        if refused:
            raise ValueError(
                f"{self.path}: refused, loading it would call {', '.join(refused)}: only tensors and plain values "
                "are loaded, never code"
            )
        self._stubs = [(type(name.rpartition(".")[2], (_Inert,), {}), name) for name in wanted]

    def _load(self) -> Any:
        with torch.serialization.safe_globals(self._stubs):
            return torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)

    @contextmanager
    def _reasons(self) -> Iterator[None]:
        try:
            yield
        except zipfile.BadZipFile as error:
            size = self.path.stat().st_size
            message = f"{self.path}: not a whole torch.save file ({error}; {size} bytes): truncated or damaged"
            raise ValueError(message) from error
        except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError, NotImplementedError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{self.path}: cannot be loaded as plain tensors: {reason}") from error
