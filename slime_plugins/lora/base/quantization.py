"""What a base is stored as on the training ranks: 4-bit NF4 codes instead of dense matrices. Pure, no torch.

NF4 (Dettmers et al. 2023, arXiv:2305.14314): blocks of 64 weights of one row share a scale, and each weight is one of
16 numbers times it. Nested ("double") quantisation stores the scales in 8 bits, in groups of 256 with a scale of their
own, after the mean of a whole matrix is taken off; a matrix is one Hugging Face projection.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.names import hf_names
from slime_plugins.lora.targets import Targets, short_name

FORMS = ("nf4",)
BLOCK = 64
"""Weights of one row that share a scale."""
GROUP = 256
"""Scales that share a scale."""


@dataclass(frozen=True, kw_only=True)
class BaseQuant:
    """How the weights of decoder linears are stored.

    Raises:
        UsageError: on construction, for a form that is not known.
    """

    form: str = "nf4"
    double_quant: bool = True
    """Nested statistics: 0.516 bytes a weight instead of 0.5625."""
    exclude: tuple[str, ...] = ()
    """Linears that stay dense: Megatron or Hugging Face names or wildcards, as LoRA targets are named."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", tuple(self.exclude))
        if self.form not in FORMS:
            raise UsageError(f"base quantisation {self.form!r} is not known; expected {', '.join(FORMS)}")

    @property
    def targets(self) -> Targets:
        """Of ``exclude``."""
        return Targets(self.exclude)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``BaseQuant(**d)`` reads it back."""
        return {**dataclasses.asdict(self), "exclude": list(self.exclude)}

    def to_hf(self, skip: Iterable[str] = ()) -> dict[str, Any]:
        """``quantization_config`` of transformers for the same bits; ``skip``: modules that stay dense there."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.form,
            "bnb_4bit_use_double_quant": self.double_quant,
            "llm_int8_skip_modules": ["lm_head", *skip],
        }

    def bytes_of(self, shape: tuple[int, int], *, shards: int = 1, cut: str = "column") -> int:
        """Bytes on one rank of one projection's [O, I] matrix; ``cut`` in ``shards`` by its rows or (``row``) columns.

        Codes, scales, and per shard the scales' own scales, 4 bytes of position per row and the mean.
        """
        numel, scales = math.prod(shape), math.prod(shape) // BLOCK
        if not self.double_quant:
            return (numel // 2 + 4 * scales) // shards
        rows = shape[0] // (1 if cut == "row" else shards)
        return (numel // 2 + scales) // shards + 4 * math.ceil(scales / GROUP) + 4 * rows + 8


def is_excluded(targets: Targets, megatron_name: str) -> bool:
    """Does this linear stay dense?

    Args:
        targets: ``BaseQuant.targets``.
        megatron_name: global; of stacked experts.
    Raises:
        UsageError: some of its projections would and others would not, but Megatron has them in one matrix.
    """
    numbers, projections = targets.parts_of(megatron_name), hf_names(megatron_name)
    if numbers and len(numbers) < len(projections):
        leaf = short_name(megatron_name)
        left = ", ".join(projections[i].rsplit(".", 1)[-1] for i in range(len(projections)) if i not in numbers)
        raise UsageError(
            f"--lora-base-quant-exclude names part of {megatron_name}, one matrix in Megatron; "
            f"name {left} too, or {leaf}"
        )
    return bool(numbers)


def check_blocks(name: str, columns: int, shards: int) -> None:
    """Refuse a linear whose rows do not divide into blocks, whole or as they are cut.

    Args:
        columns: inputs on one rank.
        shards: into how many shards the inputs are cut.
    Raises:
        UsageError: naming the linear, and what to do.
    """
    if columns % BLOCK == 0:
        return
    leaf, full = short_name(name), columns * shards
    where = f"{full} inputs" if shards == 1 else f"{full} inputs cut in {shards}"
    rest = f"use a tensor-parallel size that divides {full // BLOCK}, or " if full % BLOCK == 0 else ""
    raise UsageError(
        f"{name}: {where} do not divide into NF4's blocks of {BLOCK}; {rest}keep it dense with "
        f"--lora-base-quant-exclude {leaf}"
    )
