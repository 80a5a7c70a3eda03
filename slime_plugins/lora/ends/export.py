"""Adapters of a running, sharded model -> a PEFT adapter directory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from slime_plugins.lora.adapters import config_of, iter_adapters, iter_token_rows, refuse_trained_base
from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.checkpoint.model import other_base, stored_as
from slime_plugins.lora.layers import LoRALinear
from slime_plugins.lora.layers.pieces import stacked_pieces
from slime_plugins.lora.names import in_experts, of_expert
from slime_plugins.lora.parallel import everywhere, expert_group, gather_on_first, pipeline_group, rank
from slime_plugins.lora.peft.directory import write_adapter
from slime_plugins.lora.peft.experts_export import unread_by_peft
from slime_plugins.lora.peft.form import to_peft
from slime_plugins.lora.peft.rows import LEAVES, VocabularyRows
from slime_plugins.lora.projections import Projection


def export_peft(
    model, out_dir: str | os.PathLike, *, hf_checkpoint: str | os.PathLike, moe_format: str = "per-expert"
) -> Path:
    """Write the model's adapters as a PEFT directory, from rank 0. Call on all ranks.

    Args:
        model: a module or the list of this rank's pipeline chunks, wrapped or not.
        hf_checkpoint: directory of the base, named in ``adapter_config.json``; of a 4-bit base, what it was made
            of, or what ``slime-lora dequantize`` made of that.
        moe_format: of routed experts: ``per-expert`` (vLLM, SGLang, PEFT) or ``fused`` (PEFT); see ``moe_form``.
    Collectives:
        those of ``gather_projections``, one all_gather_object, and those of ``other_base``.
    Returns:
        ``out_dir``, complete on disk when any rank returns.
    Raises:
        UsageError, ValueError, OSError: on every rank alike, when an adapter is missing, empty or not finite (naming
            the tensor), the base trains, or is not that of ``hf_checkpoint``, or the directory cannot be written.
            Nothing is left half-written.
    """
    different = other_base(model, hf_checkpoint)
    if different:
        raise ValueError(f"{hf_checkpoint} is not the base of this model: {'; '.join(different)}")
    quant = stored_as(model, hf_checkpoint)
    projections, rows = gather_projections(model), gather_rows(model)

    def write() -> None:
        refuse_trained_base(model)
        if projections is not None and rank() == 0:
            base = BaseCheckpoint(hf_checkpoint)
            unread = unread_by_peft(base, "module", moe_format, (p.name for p in projections))
            if unread:
                warnings.warn(f"{out_dir}: {unread}", stacklevel=2)
            dropout = config_of(model).dropout
            adapter = to_peft(projections, base, dropout=dropout, moe_format=moe_format, rows=rows)
            write_adapter(out_dir, *adapter, base=base, base_quant=quant)

    everywhere(write)
    return Path(out_dir)


def gather_projections(
    model, values: Callable[[LoRALinear], AbstractContextManager] | None = None
) -> list[Projection] | None:
    """Every adapted projection whole, in layer order, on rank 0. Other ranks get a part of them, or None.

    Experts travel stacked, as they lie in the model, and are told apart when they have arrived: neither the number of
    collectives nor what is done per message grows with the number of experts.

    Args:
        values: what to be in while a linear's adapter is read; one at a time.
    Collectives:
        per linear at most one all_gather over its tensor-parallel group (three of unequal shares) and, of experts,
        one gather over the expert group; one gather_object over the pipeline group.
    """
    local: list[Projection] = []
    for linear in iter_adapters(model):
        with values(linear) if values else nullcontext():
            local += _whole(linear)
    # Rank 0 is first in its expert group, and so are its peers of the other pipeline stages in theirs.
    found = gather_on_first(local, pipeline_group())
    if found is None:
        return None
    whole = [projection for stacked in found for projection in _one_by_one(stacked)]
    # Experts after the rest of their layer.
    return sorted(whole, key=lambda p: (int(p.name.split(".", 3)[2]), in_experts(p.name)))


def gather_rows(model) -> list[VocabularyRows]:
    """The trained rows of the vocabulary on rank 0, tied ones once; other ranks get some of them, or none."""
    ids = config_of(model).trainable_token_indices
    local = [
        VocabularyRows(LEAVES[rows.lora_name], ids, rows.lora_rows.detach().cpu())
        for rows in iter_token_rows(model)
        if rows.lora_table and not rows.lora_copy
    ]
    return gather_on_first(local, pipeline_group()) or []


def _whole(linear: LoRALinear) -> Iterator[Projection]:
    """The projections of one linear's adapter, on the CPU; of experts those of all ranks, stacked, on the first.

    Collective over its tensor-parallel group and, of experts, over the expert group, whose other ranks get none.
    """
    place, parameters, spec = linear.lora_placement(), linear.lora_parameters(), linear.lora
    tensors: dict[str, torch.Tensor] = {}
    for name, pieces in stacked_pieces(linear.lora_table, spec).items():
        tensors |= place.gather(pieces, parameters[name].detach())
    gathered = tensors if spec.experts is None else _of_all_experts(tensors, expert_group())
    if gathered is not None:
        whole = {name: tensor.cpu() for name, tensor in gathered.items()}
        yield from spec.record.whole(spec.name, lambda key: whole[f"{spec.name}.{key}"])


def _of_all_experts(tensors: dict[str, torch.Tensor], group: Any) -> dict[str, torch.Tensor] | None:
    """Stacks [E, ...] of this rank's experts -> of all the layer's, on the group's first; None on the others.

    One message per rank: they hold equally many experts, in the order of the group. Collective over it.
    """
    if group is None:
        return tensors
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
    first = group.rank() == 0
    parts = [torch.empty_like(flat) for _ in range(group.size())] if first else None
    dist.gather(flat, parts, dst=dist.get_global_rank(group, 0), group=group)
    if parts is None:
        return None
    sizes = [tensor.numel() for tensor in tensors.values()]
    split = zip(*(part.split(sizes) for part in parts))
    return {
        name: torch.cat([part.view(tensor.shape) for part in of_ranks])
        for (name, tensor), of_ranks in zip(tensors.items(), split)
    }


def _one_by_one(stacked: Projection) -> Iterator[Projection]:
    """Itself; of stacked experts, views of each."""
    if stacked.A.ndim == 2:
        yield stacked
        return
    for number, (A, B) in enumerate(zip(stacked.A.unbind(), stacked.B.unbind())):
        yield Projection(of_expert(stacked.name, number), A, B, stacked.scaling)
