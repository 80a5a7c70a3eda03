"""What one adapter is, apart from its tensors: derived from its linear and the LoRAConfig."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import torch
from megatron.core import parallel_state

from slime_plugins.lora.config import LoRAConfig
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.layers.frozen import FrozenLinear
from slime_plugins.lora.layers.lowrank import Block
from slime_plugins.lora.layout import ROWS, Part, cuts_groups, parts_of_group_piece, whole
from slime_plugins.lora.names import hf_names, in_linear_attention, of_expert, record_of
from slime_plugins.lora.projections import Adapter


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """Everything about one adapter that is not a tensor."""

    name: str
    """Global Megatron name: ``decoder.layers.3.mlp.linear_fc1``, layer counted over all pipeline stages."""
    parallel: str
    """``column``, ``row``, or ``duplicated``: W, A and B whole on every tensor-parallel rank."""
    rank: int
    """Width of each A; narrower projections of a split layout are padded with zero rows, which stay zero."""
    ranks: tuple[int, ...]
    """True rank of each part."""
    scalings: tuple[float, ...]
    """Factor on B A of each part."""
    parts: tuple[Part, ...]
    """The adapted projections as rows of this rank's shard of the base."""
    all_parts: tuple[Part, ...]
    """Every projection of the base linear, adapted or not."""
    split: bool
    """One A per part instead of one for all."""
    config: LoRAConfig
    """What it was derived from."""
    experts: range | None = None
    """Experts stacked in A and B on this rank, as numbers in the whole layer; None: A and B are matrices."""
    num_experts: int = 1
    """Experts of the whole layer."""

    @property
    def projections(self) -> list[str]:
        """Full Hugging Face names of the adapted projections."""
        names = {name.rpartition(".")[2]: name for name in hf_names(self.name)}
        return [names[part.name] for part in self.parts]

    @property
    def record(self) -> Adapter:
        """What it computes, as checkpoints say it."""
        names = tuple(part.name for part in self.parts)
        return Adapter(names, self.ranks, self.scalings, "split" if self.split else "fused")

    @property
    def num_A(self) -> int:
        return len(self.parts) if self.split else 1

    @property
    def rows(self) -> int:
        """Rows of lora_B on this rank."""
        return sum(part.size for part in self.parts)

    @cached_property
    def in_base_order(self) -> bool:
        """Does lora_B cover the base's rows one to one, so that one product does?"""
        return not self.split and self.parts == self.all_parts and len(set(self.scalings)) == 1

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The products of the up projection."""
        if self.in_base_order:
            return (Block(whole("all", self.rows), slice(0, self.rows), slice(0, self.rank), self.scalings[0]),)
        blocks, row = [], 0
        for i, part in enumerate(self.parts):
            column = i * self.rank if self.split else 0
            cols = slice(column, column + self.rank)
            blocks.append(Block(part, slice(row, row + part.size), cols, self.scalings[i]))
            row += part.size
        return tuple(blocks)

    def rows_of(self, index: int) -> slice | torch.Tensor:
        """Rows of lora_B that are one part's, in Hugging Face order."""
        part = self.parts[index]
        if self.in_base_order:
            return part.index()
        rows = self.blocks[index].rows
        return rows.start + part.hf_order() if part.widths else rows

    def one_by_one(self) -> list[AdapterSpec]:
        """Itself; of stacked experts, one per expert of this rank."""
        return [self] if self.experts is None else [self.of_expert(i) for i in range(len(self.experts))]

    def of_expert(self, index: int) -> AdapterSpec:
        """The adapter of the ``index``-th expert of this rank."""
        assert self.experts is not None
        return dataclasses.replace(self, name=of_expert(self.name, self.experts[index]), experts=None, num_experts=1)


_OF_EXPERTS = ("mlp.router", "mlp.experts.")


def check_gradients(base: FrozenLinear, name: str) -> None:
    """Refuse what cannot be trained, with adapters or without: attention whose own backward is wrong (latent, and
    linear over chunks), and experts that Megatron does not train.

    The rotary part of the key is one for all heads. Its gradient is summed over tensor-parallel ranks only on the way
    back through Megatron's gather from the sequence-parallel region, so with a duplicated projection under sequence
    parallelism; else each rank keeps the part of its own heads (``MLASelfAttention.get_query_key_value_tensors``).

    Raises:
        UsageError: naming the flags that go well together.
    """
    if in_linear_attention(name.split(".", 3)[-1]) and parallel_state.get_context_parallel_world_size() > 1:
        raise UsageError(
            f"{name}: slime's linear attention over context parallelism drops the gradients that cross chunks, and "
            "every adapter below it would train on wrong ones; use --context-parallel-size 1"
        )
    path, tp_size = name.split(".", 3)[-1], parallel_state.get_tensor_model_parallel_world_size()
    if path.startswith(_OF_EXPERTS) and tp_size > 1 and not base.config.sequence_parallel:
        raise UsageError(
            f"{name}: Megatron trains no experts at tensor-parallel size {tp_size} without sequence parallelism "
            "(MoELayer.forward, at the first step); add --sequence-parallel, or use tensor-parallel size 1"
        )
    if not name.endswith("linear_kv_down_proj") or base.tp_group.size() == 1:
        return
    if base.parallel != "duplicated" or not base.config.sequence_parallel:
        how = "without --sequence-parallel" if base.parallel == "duplicated" else "with --transformer-impl local"
        raise UsageError(
            f"{name}: Megatron's gradients of multi-latent attention are wrong {how} at tensor-parallel size "
            f"{base.tp_group.size()}; use --transformer-impl transformer_engine --sequence-parallel, or "
            "tensor-parallel size 1"
        )


_CUT = (
    "with more tensor-parallel ranks than key/value heads, a rank holds a piece of q, k and v together, and only an "
    "adapter of all three with one A and one scaling is cut as they are; use a tensor-parallel size that divides the "
    "number of key/value heads"
)


def _check_whole(
    name: str, part_numbers: tuple[int, ...], leaves: tuple[str, ...], base: FrozenLinear, config: LoRAConfig
) -> None:
    """Refuse what a rank that holds a piece of a query group cannot hold."""
    what = f"{name}, {base.shards} ranks, {base.config.num_query_groups} key/value heads"
    if config.layout == "split":
        raise UsageError(f"{what}: --lora-layout split: {_CUT}, or --lora-layout fused")
    if len(part_numbers) < len(leaves):
        adapted = ", ".join(leaves[i] for i in part_numbers)
        raise UsageError(f"{what}: {adapted} alone: {_CUT}, or target linear_qkv")


def spec_for(base: FrozenLinear, name: str, part_numbers: tuple[int, ...], config: LoRAConfig) -> AdapterSpec:
    """The adapter that a LoRAConfig asks for on one linear.

    Args:
        name: global Megatron name of the linear.
        part_numbers: adapted projections, as positions in ``names.hf_names(name)``.
    Raises:
        UsageError: a rank above the matrix's size, a rank for one projection in a fused layout, a shard that cuts
            through a query group.
    """
    record, (rows, columns), tp_size = record_of(name), base.shape, base.tp_group.size()
    pieces_of_groups = record.rows == "qkv" and cuts_groups(base.config, base.shards)
    if pieces_of_groups:
        _check_whole(name, part_numbers, record.leaves, base, config)
        all_parts = parts_of_group_piece(name, record.leaves, rows, base.config, base.shards, base.tp_group.rank())
    else:
        all_parts = ROWS[record.rows](name, record.leaves, rows, base.config, tp_size)
    parts = tuple(all_parts[i] for i in part_numbers)
    split = config.layout == "split" and len(all_parts) > 1
    projections = [(name, hf_names(name)[i]) for i in part_numbers]
    ranks = tuple(config.rank_of(*names) for names in projections)
    if not split and len(set(ranks)) > 1:
        raise UsageError(
            f"rank_pattern gives the projections of {name} ranks {sorted(set(ranks))}, but in layout 'fused' they "
            f"share one A; use --lora-layout split, or name {name.rsplit('.', 1)[-1]} instead"
        )
    scalings = tuple(config.scaling(*names) for names in projections)
    if pieces_of_groups and len(set(scalings)) > 1:
        raise UsageError(f"alpha_pattern gives the projections of {name} scalings {sorted(set(scalings))}: {_CUT}")
    if config.dropout and base.experts is not None and tp_size > 1:
        raise UsageError(
            f"LoRA dropout on {name} with expert tensor parallelism: its ranks could not agree on a mask; "
            "use --lora-dropout 0, --expert-tensor-parallel-size 1, or exclude the experts"
        )
    down, across = (base.shards if base.parallel == cut else 1 for cut in ("column", "row"))
    full_in = columns * across
    for part, rank in zip(parts, ranks):
        full_out = (part.size if split or len(parts) == 1 else rows) * down
        if rank > min(full_in, full_out):
            raise UsageError(
                f"LoRA rank {rank} is larger than {name} [{part.name}], a {full_out} x {full_in} matrix; "
                f"use at most {min(full_in, full_out)}"
            )
    return AdapterSpec(
        name=name,
        parallel=base.parallel,
        rank=max(ranks),
        ranks=ranks,
        scalings=scalings,
        parts=parts,
        all_parts=all_parts,
        split=split,
        config=config,
        experts=base.experts,
        num_experts=base.num_experts,
    )
