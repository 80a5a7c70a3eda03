"""Experts that a base holds stacked, all of a layer in one tensor, as if each had a matrix of its own.

    gate_up_proj   [E, 2I, H], or transposed [E, H, 2I]    rows of gate, then of up
    down_proj      [E, H, I],  or transposed [E, I, H]

Qwen3.5-MoE's hub files hold the first form, those of Qwen3-VL-MoE the transposed one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slime_plugins.lora.files.safetensors import Stored

if TYPE_CHECKING:
    import torch

LEAVES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Stacked parameter -> the projections in it, in the order of its rows."""
_STACK = re.compile(r"(?P<experts>.+\.experts)\.(?P<parameter>gate_up_proj|down_proj)")


@dataclass(frozen=True)
class StackedExpert:
    """One projection of one expert: where it lies in the tensor of its layer."""

    tensor: str
    expert: int
    part: int
    parts: int
    transposed: bool
    shape: tuple[int, int]
    """[out, in], as if it were a linear."""

    def view(self, stack: torch.Tensor) -> torch.Tensor:
        """Its matrix in the whole tensor: a view [out, in]."""
        matrix = stack[self.expert].t() if self.transposed else stack[self.expert]
        return matrix.chunk(self.parts)[self.part]


def stacked_experts(weights: Mapping[str, Stored], config: Mapping[str, Any]) -> dict[str, StackedExpert]:
    """``...experts.3.gate_proj`` -> its place, for every expert of every stack among a base's weights.

    Args:
        config: of the language model, which tells the transposed form.
    """
    hidden, width = config.get("hidden_size"), config.get("moe_intermediate_size")
    found: dict[str, StackedExpert] = {}
    for name, stored in weights.items():
        match = _STACK.fullmatch(name)
        if match is None or len(stored.shape) != 3 or 0 in stored.shape:
            continue
        transposed = _is_transposed(match["experts"], weights, hidden, width)
        found.update(_members(name, match["experts"], match["parameter"], stored.shape, transposed))
    return found


def _is_transposed(experts: str, weights: Mapping[str, Stored], hidden: Any, width: Any) -> bool:
    """Rows and columns of one of the two parameters differ, whatever the widths: that one tells."""
    if not isinstance(hidden, int) or not isinstance(width, int):
        return False
    for parameter, rows, columns in (("down_proj", hidden, width), ("gate_up_proj", 2 * width, hidden)):
        stored = weights.get(f"{experts}.{parameter}")
        if stored is not None and len(stored.shape) == 3 and rows != columns:
            return tuple(stored.shape[1:]) == (columns, rows)
    return False


def _members(
    name: str, experts: str, parameter: str, shape: tuple[int, ...], transposed: bool
) -> Iterator[tuple[str, StackedExpert]]:
    count, rows, columns = shape if not transposed else (shape[0], shape[2], shape[1])
    leaves = LEAVES[parameter]
    for expert in range(count):
        for part, leaf in enumerate(leaves):
            out = (rows // len(leaves), columns)
            yield f"{experts}.{expert}.{leaf}", StackedExpert(name, expert, part, len(leaves), transposed, out)
