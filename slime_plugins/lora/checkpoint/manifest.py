"""``adapter.json``: what a checkpoint holds, in words, and the checksums that tie its files together."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slime_plugins.lora.base.quantization import BaseQuant
from slime_plugins.lora.checkpoint.directory import ADAPTER_JSON
from slime_plugins.lora.config import DTYPES, LAYOUTS, LoRAConfig
from slime_plugins.lora.files.json_text import read_json
from slime_plugins.lora.files.regular import open_regular
from slime_plugins.lora.names import hf_names
from slime_plugins.lora.projections import Adapter
from slime_plugins.lora.version import __version__

FORMAT = "slime-lora adapter"
FORMAT_VERSION = 1
_LARGEST = 1 << 30
"""Bytes of a file beside the tensor data; the largest holds some kilobytes per rank."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of ``adapter.json``."""

    step: int | None
    config: LoRAConfig
    adapters: Mapping[str, Adapter]
    """By global Megatron name."""
    base: Mapping[str, Any]
    """Fingerprint of the base, see ``base``."""
    optimizer: Mapping[str, Any] | None
    """Names of the state tensors and scalars (``step``); None without optimizer state."""
    parallelism: Mapping[str, int]
    """Of the run that wrote it: random states are restored at the same one only."""

    def write(self, directory: Path) -> None:
        """Write ``adapter.json`` with the checksums of all files that are there but those of tensor data.

        Data files are covered record by record in ``tensors.json``.
        """
        names = sorted(p.name for p in directory.iterdir() if p.suffix != ".distcp" and p.name != ADAPTER_JSON)
        sums = {name: file_digest(directory / name) for name in names}
        content: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "slime_lora_version": __version__,
            "step": self.step,
            "config": self.config.to_dict(),
            "adapters": {name: asdict(adapter) for name, adapter in self.adapters.items()},
            "base": dict(self.base),
            "optimizer": self.optimizer,
            "parallelism": dict(self.parallelism),
            "sha256": sums,
        }
        content["sha256"] = {**sums, "this file": _self_digest(content)}
        (directory / ADAPTER_JSON).write_text(_text(content), encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read ``adapter.json`` and compare every file that it lists with its checksum.

        Raises:
            ValueError, OSError: naming the file that is missing, damaged or from another checkpoint.
        """
        path = directory / ADAPTER_JSON
        try:
            content = read_json(path)
        except ValueError as error:
            raise ValueError(f"{path} is truncated or damaged: {error}") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path} does not describe an adapter checkpoint")
        if content.get("format_version") != FORMAT_VERSION:
            found = content.get("format_version")
            raise ValueError(f"{path} has format version {found}, this is slime-lora for version {FORMAT_VERSION}")
        checksums = content.get("sha256")
        if not isinstance(checksums, dict) or checksums.get("this file") != _self_digest(content):
            raise ValueError(f"{path} was changed after it was written: its own checksum does not match")
        for name, expected in checksums.items():
            if name == "this file":
                continue
            if Path(name).name != name:
                raise ValueError(f"{path} speaks of {name!r:.80}, which is no file beside it")
            if not (directory / name).exists():
                raise ValueError(f"{directory / name} is missing")
            if file_digest(directory / name) != expected:
                raise ValueError(f"{directory / name} is not the file that {ADAPTER_JSON} was written with: damaged")
        try:
            return cls._of(content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} does not describe an adapter checkpoint: {error!r:.200}") from error

    @classmethod
    def _of(cls, content: Mapping[str, Any]) -> Manifest:
        """Raises ValueError, KeyError, TypeError, AttributeError for what was not written here."""
        adapters: dict[str, Adapter] = {}
        for name, entry in content["adapters"].items():
            fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in entry.items()}
            adapters[name] = Adapter(**fields)
        for name, adapter in adapters.items():
            known = {full.rpartition(".")[2] for full in hf_names(name)}
            same = len(adapter.projections) == len(adapter.ranks) == len(adapter.scalings) > 0
            if not same or not known.issuperset(adapter.projections) or adapter.layout not in LAYOUTS:
                raise ValueError(f"adapter of {name}")
            whole = all(type(rank) is int and rank > 0 for rank in adapter.ranks)
            if not whole or not all(map(math.isfinite, adapter.scalings)):
                raise ValueError(f"ranks or scalings of {name}")
        fingerprint = content["base"]
        if not isinstance(fingerprint["dtype"], str) or fingerprint["dtype"] not in DTYPES:
            raise ValueError(f"dtype of the base {fingerprint['dtype']!r:.40}")
        sums = {**fingerprint["layers"], **(fingerprint.get("rest") or {})}
        numbers = all(n.isascii() and n.isdecimal() and len(n) < 6 for n in fingerprint["layers"])
        if not isinstance(fingerprint["architecture"], dict) or not numbers:
            raise ValueError("fingerprint of the base")
        if not all(isinstance(value, str) for value in sums.values()):
            raise ValueError("checksums of the base")
        if fingerprint.get("quantization") is not None:
            BaseQuant.read(fingerprint["quantization"], "base")
        return cls(
            step=content["step"],
            config=LoRAConfig(**content["config"]),
            adapters=adapters,
            base=fingerprint,
            optimizer=content["optimizer"],
            parallelism=content["parallelism"],
        )


def adapter_differences(saved: Mapping[str, Adapter], model: Mapping[str, Adapter]) -> list[str]:
    """One phrase per adapter that a model and a checkpoint do not have alike."""
    found = []
    missing, extra = [n for n in model if n not in saved], [n for n in saved if n not in model]
    if missing:
        found.append(f"the checkpoint has no adapter for {_listed(missing)}")
    if extra:
        found.append(f"this model has no adapter for {_listed(extra)}")
    changes: dict[str, list[str]] = {}
    for name in sorted(saved.keys() & model.keys()):
        for field, was in asdict(saved[name]).items():
            now = getattr(model[name], field)
            if was != now:
                changes.setdefault(f"{field} {_short(was)} in the checkpoint, {_short(now)} here", []).append(name)
    return found + [f"{change}, in {_listed(names)}" for change, names in changes.items()]


def file_digest(path: Path) -> str:
    """SHA-256 of a file beside the tensor data: kilobytes, or some megabytes. Raises ValueError for an endless one."""
    sha = hashlib.sha256()
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > _LARGEST:
            raise ValueError(f"{path}: has more than {_LARGEST:,} bytes, which no file of a checkpoint has: damaged")
        while data := file.read(1 << 20):
            sha.update(data)
    return sha.hexdigest()


def _self_digest(content: Mapping[str, Any]) -> str:
    sums = {name: value for name, value in content["sha256"].items() if name != "this file"}
    text = json.dumps({**content, "sha256": sums}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _text(content: Mapping[str, Any]) -> str:
    """JSON with a line per field, and per adapter: two levels deep, for people."""
    lines = []
    for key, value in content.items():
        text = json.dumps(value)
        if isinstance(value, dict) and value:
            inner = ",\n".join(f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
            text = f"{{\n{inner}\n  }}"
        lines.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _short(value) -> str:
    return ", ".join(str(v) for v in dict.fromkeys(value)) if isinstance(value, (list, tuple)) else str(value)


def _listed(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
