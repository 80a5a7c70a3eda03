"""What slime makes of weights for engines that run a quantised copy. No torch; numbers: ``quantised_sync``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Scheme:
    """How slime's quantiser stores a weight, by the ``quantization_config`` of the Hugging Face checkpoint."""

    form: str
    """``fp8`` (e4m3) or ``int4`` (symmetric, packed into int32)."""
    block: tuple[int, int] | None
    """Rows and columns that share a scale; None: the whole tensor does."""

    def __str__(self) -> str:
        name = {"fp8": "FP8", "int4": "INT4"}[self.form]
        return f"{name}, one scale per " + ("tensor" if self.block is None else f"{self.block[0]} x {self.block[1]}")


def scheme_of(quantization: Any) -> Scheme | None:
    """The scheme that slime v0.2.4 to v0.3.1 quantises by a ``quantization_config``; None without one, or another."""
    if not isinstance(quantization, Mapping):
        return None
    try:
        if quantization.get("quant_method") == "fp8" and quantization.get("fmt", "e4m3") == "e4m3":
            block = quantization.get("weight_block_size")
            return Scheme("fp8", None if block is None else (int(block[0]), int(block[1])))
        if quantization.get("quant_method") == "compressed-tensors":
            weights = quantization["config_groups"]["group_0"]["weights"]
            if weights["num_bits"] == 4 and weights["symmetric"] and weights["group_size"] > 0:
                return Scheme("int4", (1, int(weights["group_size"])))
    except (KeyError, TypeError, IndexError, ValueError):
        return None  # slime's quantiser stops at it
    return None
