"""What a Hugging Face checkpoint directory holds, from ``config.json`` and safetensors headers: no model is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from slime_plugins.lora.errors import UsageError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_SAMPLE = 4096  # bytes from the start of each tensor that go into the fingerprint


@dataclass(frozen=True)
class Weight:
    """One tensor of a checkpoint, not loaded."""

    file: Path
    dtype: str
    """As safetensors writes it: ``BF16``, ``F32``, ``U8``, ..."""
    shape: tuple[int, ...]
    start: int
    """Byte offset in the file."""
    end: int


class BaseCheckpoint:
    """Names and shapes of a base model's weights.

    Raises:
        UsageError: the directory is not a Hugging Face checkpoint with safetensors.
        ValueError: a file of it is damaged or missing.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        self.config = self._config()
        self.weights: dict[str, Weight] = {}
        for path in self._files():
            self.weights.update(_read_header(path))

    def linear_shape(self, module: str) -> tuple[int, int] | None:
        """[out, in] of a linear; None when the base has no such module, or holds it packed (4-bit)."""
        weight = self.weights.get(f"{module}.weight")
        if weight is None and module == "lm_head" and self.config.get("tie_word_embeddings"):
            weight = self.weights.get("model.embed_tokens.weight")
        if weight is None or len(weight.shape) != 2 or weight.dtype not in _FLOATS:
            return None
        return weight.shape

    @cached_property
    def linears(self) -> frozenset[str]:
        """Names of all modules with a matrix for a weight, embeddings left out; packed (4-bit) ones too."""
        names = {name.removesuffix(".weight") for name, w in self.weights.items() if len(w.shape) == 2}
        names = {name for name in names if f"{name}.weight" in self.weights}
        names |= {name.removesuffix(".qweight") for name in self.weights if name.endswith(".qweight")}
        if self.config.get("tie_word_embeddings"):
            names.add("lm_head")
        return frozenset(name for name in names if "embed" not in name.rpartition(".")[2])

    def fingerprint(self) -> str:
        """SHA-256 over name, dtype, shape and the first 4 KiB of every weight, however they are spread over files.

        Two fine-tunes of one model have equal shapes; the samples tell them apart without reading gigabytes.
        """
        sha = hashlib.sha256()
        for name in sorted(self.weights):
            weight = self.weights[name]
            sha.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
            with open(weight.file, "rb") as file:
                file.seek(weight.start)
                sha.update(file.read(min(_SAMPLE, weight.end - weight.start)))
        return sha.hexdigest()

    def _config(self) -> dict[str, Any]:
        path = self.directory / "config.json"
        if not path.is_file():
            raise UsageError(
                f"{self.directory} has no config.json; expected the directory of a Hugging Face checkpoint"
            )
        try:
            return json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: not valid JSON: {error}") from error

    def _files(self) -> list[Path]:
        index = self.directory / _INDEX
        if not index.is_file():
            single = self.directory / _SINGLE
            if not single.is_file():
                raise UsageError(f"{self.directory} has no {_SINGLE} and no {_INDEX}; other weight files are not read")
            return [single]
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{index}: not a safetensors index: {error!r}") from error
        files = [self.directory / name for name in sorted(names)]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"{self.directory}: {_INDEX} names {', '.join(missing)}, which is not there")
        return files


def _read_header(path: Path) -> dict[str, Weight]:
    """Tensors of one safetensors file: 8 bytes of header length, the header as JSON, then the data."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise ValueError(f"its header wants {length} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        base = 8 + length
        weights = {
            name: Weight(path, entry["dtype"], tuple(entry["shape"]), *(base + o for o in entry["data_offsets"]))
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({size} bytes): {error}") from error
    end = max((weight.end for weight in weights.values()), default=base)
    if end != size:
        raise ValueError(f"{path}: truncated or damaged: {size} bytes where its header describes {end}")
    return weights
