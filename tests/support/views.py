"""Adapted linears one by one: stacked experts as views with an adapted linear's attributes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slime_plugins.lora.adapters import iter_adapters


@dataclass(frozen=True)
class One:
    """One base matrix and its adapter."""

    owner: Any
    index: Any
    """Of the expert, or ``...``."""
    lora: Any

    @property
    def lora_A(self):
        return self.owner.lora_A[self.index]

    @property
    def lora_B(self):
        return self.owner.lora_B[self.index]

    @property
    def weight(self):
        """The base matrix itself."""
        return self.owner.lora_base.parameters[0 if self.index is ... else self.index]

    def update(self):
        """scaling * B A of this rank's shard."""
        return self.owner.lora_update(0 if self.index is ... else self.index)

    @property
    def lora_tp_group(self):
        return self.owner.lora_group

    @property
    def lora_tp_size(self) -> int:
        return self.owner.lora_base.shards


def iter_linears(model):
    """Every adapted matrix of a model."""
    for linear in iter_adapters(model):
        specs = linear.lora.one_by_one()
        yield from (One(linear, ... if linear.lora.experts is None else i, spec) for i, spec in enumerate(specs))
