"""The parameters of an adapter, as a table: what each is on a rank, and how it is cut. Pure arithmetic, no torch.

Adapting, hiding, moving, checkpoints, policies, counting, cost, export and import read the table, so a variant of LoRA
with another parameter is another table. Of the plain one, per rank (T tensor-parallel size, R rank, P stacked As, I
inputs and O adapted rows of the base):

    column       lora_A [P*R, I]    replicated          lora_B [O/T, R]  sharded with the base's rows
    row          lora_A [P*R, I/T]  sharded on dim 1    lora_B [O, R]    replicated
    duplicated   lora_A [P*R, I], lora_B [O, R], both replicated, like the base
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class AdapterParameter:
    """One parameter of an adapter. Where experts are stacked, each has its own, and they lie in front: [E, ...]."""

    name: str
    """Attribute and state-dict name; starts with ``lora_``."""
    shape: tuple[int, ...]
    """On this rank, of one expert."""
    sharded_dim: int | None
    """Dimension of ``shape`` that is cut over (expert-)tensor-parallel ranks; None: each holds it all."""
    rows: str
    """What dimension 0 is, and so how a checkpoint takes it apart: ``projections``, the adapted rows of the base in
    its own order; ``stacked``, equal blocks, one per stacked A; ``whole``, neither."""

    @property
    def numel(self) -> int:
        """On this rank, of one expert."""
        return math.prod(self.shape)

    def full_numel(self, shards: int) -> int:
        """Over all tensor-parallel ranks, each replica counted once, of one expert."""
        return self.numel * (shards if self.sharded_dim is not None else 1)


def lora_parameters(
    parallel: str, *, rows: int, columns: int, rank: int, stacked: int = 1
) -> tuple[AdapterParameter, AdapterParameter]:
    """A and B of y = W x + scaling * B A x (Hu et al. 2021, arXiv:2106.09685).

    Args:
        parallel: ``column``, ``row`` or ``duplicated``: how the base is cut.
        rows: adapted rows of this rank's shard of the base.
        columns: of this rank's shard.
        rank: width of each A.
        stacked: As one below the other: one per projection in layout ``split``.
    """
    return (
        AdapterParameter(
            name="lora_A",
            shape=(stacked * rank, columns),
            sharded_dim=1 if parallel == "row" else None,
            rows="stacked",
        ),
        AdapterParameter(
            name="lora_B", shape=(rows, rank), sharded_dim=0 if parallel == "column" else None, rows="projections"
        ),
    )


def token_rows(count: int, hidden: int) -> tuple[AdapterParameter]:
    """The change of ``count`` rows of an embedding or output layer: whole on every tensor-parallel rank."""
    return (AdapterParameter(name="lora_rows", shape=(count, hidden), sharded_dim=None, rows="whole"),)
