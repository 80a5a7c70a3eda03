"""A PEFT adapter directory on disk: ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``).

Written whole or not at all, and with checksums: the safetensors metadata, which other readers ignore, holds the
SHA-256 of every tensor and the config that the tensors were written with. Reading compares both when they are there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.base.fingerprint import weights_digest
from slime_plugins.lora.base.quantization import BaseQuant
from slime_plugins.lora.files.atomic import replaced_directory
from slime_plugins.lora.files.json_text import parse_json, read_object
from slime_plugins.lora.files.safetensors import Stored, data_of, read_header, write_tensors
from slime_plugins.lora.files.torch_file import TorchFile
from slime_plugins.lora.peft.checks import absent_targets, config_problems, tensor_problems
from slime_plugins.lora.peft.config import parse_key
from slime_plugins.lora.peft.experts_form import per_expert
from slime_plugins.lora.peft.rows import ALONE

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
BIN = "adapter_model.bin"

SHA256 = "slime_lora.sha256"  # metadata: JSON, tensor name -> digest
_CONFIG = "slime_lora.config"  # metadata: JSON, the fields of the config below that were set
_BASE = "slime_lora.base"  # metadata: fingerprint of the base checkpoint, from samples
_BASE_DIGEST = "slime_lora.base_digest"  # metadata: digest of every byte of it, where somebody read them all
_BASE_QUANT = "slime_lora.base_quant"  # metadata: JSON, what the base was stored as; absent: dense
# Fields that change what the adapter computes. The others (base path, task type) may be edited freely.
_MEANING = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "use_rslora", "use_dora", "bias", "fan_in_fan_out", "modules_to_save", "target_parameters",
    "trainable_token_indices", "token_indices",
)  # fmt: skip


class AdapterTensors(Mapping[str, torch.Tensor]):
    """The tensors of an adapter file, by their names in the file, read one at a time and compared with checksums.

    ``tensors[key]`` raises ValueError when the bytes are not those that were written.
    """

    def __init__(self, path: Path):
        self.path = path
        self.metadata: dict[str, str] = {}
        self._bin: TorchFile | None = None
        self._stored: dict[str, Stored] = {}
        self._good: set[str] = set()  # whose bytes have been compared: they are hashed once
        if path.suffix == ".bin":
            self._bin = TorchFile(path)
            self._keys = _tensor_keys(self._bin)
        else:
            header = read_header(path)
            self._stored, self.metadata = header.tensors, header.metadata
            self._keys = tuple(header.tensors)
        self.sha256: dict[str, str] | None = _json_object(path, self.metadata.get(SHA256))
        """Digest of every tensor when written; None for files that carry none."""

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, key: str) -> torch.Tensor:
        tensor, fault = self.load(key)
        if fault:
            raise ValueError(f"{self.path}: {fault}")
        return tensor

    def load(self, key: str) -> tuple[torch.Tensor, str | None]:
        """The tensor as it is in the file, and the reason not to use it, if there is one."""
        if self._bin is not None:
            tensor = self._bin.value[key]
            if key not in self._good:
                try:
                    self._bin.checked(tensor)
                except ValueError as error:
                    return tensor, f"{key}: {error}"
        else:
            tensor = self._stored[key].read()
            if self.sha256 is not None and key not in self.sha256:
                return tensor, f"{key} was not in the file when it was written"
            if self.sha256 is not None and key not in self._good and digest(tensor) != self.sha256[key]:
                fault = "checksum mismatch, its bytes are not those that were written: copy the file again"
                return tensor, f"{key}: {fault}"
        self._good.add(key)
        return tensor, None

    @property
    def has_checksums(self) -> bool:
        """Whether ``load`` has something to compare the bytes with."""
        return self.sha256 is not None or self.path.suffix == ".bin"

    @property
    def base_fingerprint(self) -> str | None:
        """``BaseCheckpoint.fingerprint`` of the base it was written for, if it was noted."""
        return self.metadata.get(_BASE)

    @property
    def base_digest(self) -> str | None:
        """``base.fingerprint.weights_digest`` of the base it was written for, if it was noted."""
        return self.metadata.get(_BASE_DIGEST)

    def other_base(self, base: BaseCheckpoint, *, full: bool) -> tuple[str | None, str]:
        """Compare ``base`` with what was noted when the adapter was written.

        Args:
            full: every byte of the base, if that was noted; else the first 4 KiB of each tensor.
        Returns:
            why it is another base, or None; and what was compared, for people.
        """
        noted, found = self.base_fingerprint, None
        compared = f"first 4 KiB of each of {len(base.weights)} tensors"
        if full and self.base_digest:
            noted, found = self.base_digest, weights_digest(base)
            compared = f"every byte of {len(base.weights)} tensors"
        elif noted:
            found = base.fingerprint
            compared += " (of the others the adapter notes nothing)" if full else ""
        if not noted or found is None:
            return None, "shapes only: the adapter does not say which base it was made for"
        if found == noted:
            return None, compared
        return (
            f"the adapter was made for a base with other weights (fingerprint {noted[:12]}) than {base.directory} "
            f"holds ({found[:12]})",
            compared,
        )

    @property
    def base_quant(self) -> BaseQuant | None:
        """What the base was stored as while the adapter was trained; None: dense, or not noted. Raises ValueError."""
        noted = _json_object(self.path, self.metadata.get(_BASE_QUANT))
        return None if noted is None else BaseQuant.read(noted, self.path)

    def lost(self) -> list[str]:
        """Names that have a checksum and no tensor."""
        return sorted(set(self.sha256 or ()) - set(self._keys))

    def config_changes(self, config: Mapping[str, Any]) -> list[str]:
        """One line per field of ``config`` that is not what the tensors were written with."""
        written = _json_object(self.path, self.metadata.get(_CONFIG))
        if written is None:
            return []
        return [
            f"{CONFIG}: {field} is {config.get(field)!r}, but {self.path.name} was written with "
            f"{written.get(field)!r}: one of the two files is damaged or from another adapter"
            for field in _MEANING
            if (config.get(field) or None) != (written.get(field) or None)
        ]


def read_config(adapter_dir: str | os.PathLike) -> dict[str, Any]:
    """``adapter_config.json`` of a directory, as it is. Raises OSError or ValueError naming the file."""
    path = Path(adapter_dir) / CONFIG
    try:
        return read_object(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; an adapter directory has {CONFIG}") from None


def open_tensors(adapter_dir: str | os.PathLike) -> AdapterTensors:
    """The adapter's tensors, from safetensors if both forms are there. Raises OSError, ValueError naming the file."""
    for name in (SAFETENSORS, BIN):
        path = Path(adapter_dir) / name
        if path.exists():
            return AdapterTensors(path)
    raise FileNotFoundError(f"{adapter_dir}: no {SAFETENSORS} and no {BIN}")


def read_adapter(adapter_dir: str | os.PathLike) -> tuple[dict[str, Any], AdapterTensors]:
    """Config and tensors (lazy) of an adapter directory, refused when they are not the pair that was written.

    Names stay as they are in the file; ``peft_config.parse_key`` reads them.

    Raises:
        OSError: a file is missing or unreadable.
        ValueError: a file is damaged, or the two do not belong together. Values are judged by ``validate_adapter``.
    """
    config, tensors = read_config(adapter_dir), open_tensors(adapter_dir)
    faults = tensors.config_changes(config) + [f"{tensors.path}: {name} is lost" for name in tensors.lost()]
    if faults:
        raise ValueError(_summary(faults))
    return config, tensors


def validate_adapter(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError, naming the tensor, unless this is a whole, finite adapter that its config describes."""
    problems = config_problems(config) or tensor_problems(*per_expert(config, tensors))
    if problems:
        raise ValueError(_summary([problem.message for problem in problems]))


def write_adapter(
    out_dir: str | os.PathLike,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    *,
    base: str | os.PathLike | BaseCheckpoint | None = None,
    base_digest: str | None = None,
    base_quant: BaseQuant | None = None,
    inspect: Callable[[Path], None] | None = None,
    validated: bool = False,
) -> None:
    """Write an adapter directory, whole or not at all, after ``validate_adapter``.

    Keys are ``base_model.model.<module>.lora_A.weight`` [rank, in] and ``lora_B`` [out, rank]. An existing adapter in
    ``out_dir`` is replaced in one step; other files in the directory stay. ``base``: the base
    checkpoint, whose fingerprint then goes with the adapter, as does ``base_quant``, what it was stored as;
    ``base_digest``: that of all its bytes, for a caller who has read them. ``inspect`` is called with the finished
    directory before it takes its place; if it raises, nothing has changed. ``validated``: by the caller, before it
    gave the adapter names that PEFT would not read (see ``dialect``).

    Raises:
        ValueError: the adapter is empty, partial, not finite or not what its config says; or ``out_dir`` holds
            something that is not an adapter.
    """
    if not validated:
        validate_adapter(config, tensors)
    modules = [parsed[0] for parsed in map(parse_key, tensors) if parsed]
    absent = [] if config.get("peft_type") == ALONE else absent_targets(config, modules)
    if absent and not validated:
        raise ValueError(f"target_modules names {absent[0]!r}, but the adapter holds no tensor for it")
    out = Path(out_dir)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file, expected a directory to write the adapter to")
    if out.is_dir() and any(out.iterdir()) and not (out / CONFIG).is_file():
        raise ValueError(f"{out}: holds other files and no {CONFIG}: not an adapter, not overwritten")
    kept = {key: tensors[key] for key in tensors}
    data = {key: data_of(tensor) for key, tensor in kept.items()}
    metadata = {
        SHA256: json.dumps({key: _digest(tensor, data[key]) for key, tensor in kept.items()}),
        _CONFIG: json.dumps({field: config[field] for field in _MEANING if field in config}),
    }
    if base is not None:
        metadata[_BASE] = BaseCheckpoint.of(base).fingerprint
    if base_digest is not None:
        metadata[_BASE_DIGEST] = base_digest
    if base_quant is not None:
        metadata[_BASE_QUANT] = json.dumps(base_quant.to_dict())
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
    with replaced_directory(out, drop=(CONFIG, SAFETENSORS, BIN)) as new:
        try:
            write_tensors(new / SAFETENSORS, kept, data, metadata)
        except OSError as error:
            raise OSError(f"{out}: cannot write {SAFETENSORS}: {error}") from error
        (new / CONFIG).write_text(text, encoding="utf-8")
        if inspect is not None:
            inspect(new)


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of dtype, shape and bytes."""
    return _digest(tensor, data_of(tensor))


def _digest(tensor: torch.Tensor, data: memoryview) -> str:
    sha = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    sha.update(data)
    return sha.hexdigest()


def _tensor_keys(file: TorchFile) -> tuple[str, ...]:
    if not isinstance(file.value, dict):
        raise ValueError(f"{file.path}: expected a dictionary of tensors, got {type(file.value).__name__}")
    for key, tensor in file.value.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{file.path}: expected names with tensors, got {key!r:.80} with {type(tensor).__name__}")
    return tuple(file.value)


def _json_object(path: Path, text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: damaged header: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: damaged header: expected a JSON object, got {type(value).__name__}")
    return value


def _summary(lines: list[str]) -> str:
    """The first fault, and how many more there are: errors are one line; ``slime-lora verify`` lists all."""
    more = f" (and {len(lines) - 1} more, `slime-lora verify` lists them)" if len(lines) > 1 else ""
    return lines[0] + more
