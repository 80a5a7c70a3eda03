"""Numbers out of a ``config.json`` that may hold anything. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LARGEST = 2**31 - 1
"""Of any size in a config."""
MOST_LAYERS = 10_000
"""Every layer has its names written out."""


@dataclass(frozen=True)
class Sizes:
    """Reads numbers out of a config that may hold anything. Each raises ValueError naming file, key and value."""

    config: dict[str, Any]
    file: Path

    def size(self, key: str, default: int | None = None, *, most: int = _LARGEST) -> int:
        """A whole number of at least 1; null counts as absent."""
        value = self._value(key, default)
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{self.file}: {key} is {value!r:.80}, expected a whole number from 1 to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._value(key, default)
        whole = type(value) is int and 0 < value <= _LARGEST
        if not whole and not (isinstance(value, float) and math.isfinite(value) and value > 0):
            raise ValueError(f"{self.file}: {key} is {value!r:.80}, expected a number above 0")
        return value

    def flag(self, key: str) -> bool:
        value = self._value(key, False)
        if not isinstance(value, bool):
            raise ValueError(f"{self.file}: {key} is {value!r:.80}, expected true or false")
        return value

    def _value(self, key: str, default: Any) -> Any:
        value = self.config.get(key)
        if value is None and default is None:
            raise ValueError(f"{self.file}: key {key!r} is missing")
        return default if value is None else value


def refuse_quantised(quantization: Any, config_file: Path) -> None:
    """Of what a config says that weights are stored as, only bitsandbytes' NF4 is read (``base.coded``)."""
    if quantization is None:
        return
    told = quantization if isinstance(quantization, dict) else {}
    if told.get("quant_method") != "bitsandbytes" or not told.get("load_in_4bit"):
        raise ValueError(
            f"{config_file}: quantization_config = {quantization!r:.80} is not supported; give the dense checkpoint, "
            "or one in bitsandbytes' nf4"
        )
    form = told.get("bnb_4bit_quant_type")
    if form != "nf4":
        raise ValueError(
            f"{config_file}: bnb_4bit_quant_type is {form!r:.80}, and nf4 alone is read (QLoRA's form, and more exact "
            "at the same size); quantise the dense checkpoint with nf4, or give that"
        )
