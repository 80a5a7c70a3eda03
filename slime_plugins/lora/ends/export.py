"""Adapters of a running, sharded model -> a PEFT adapter directory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from slime_plugins.lora.adapters import config_of, iter_adapters, iter_token_rows, refuse_trained_base
from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.checkpoint.model import other_base, stored_as
from slime_plugins.lora.layers import LoRALinear
from slime_plugins.lora.names import in_experts
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
        all_gather over each tensor- and expert-tensor-parallel group, gather_object over each expert- and
        pipeline-parallel group, one all_gather_object, and those of ``other_base``.
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


def gather_projections(model) -> list[Projection] | None:
    """Every adapted projection whole, in layer order, on rank 0. Other ranks get a part of them, or None."""
    local = [projection for linear in iter_adapters(model) for projection in _whole(linear)]
    # Rank 0 is first in its expert group, and so are its peers of the other pipeline stages in theirs.
    experts = gather_on_first([p for p in local if in_experts(p.name)], expert_group())
    if experts is not None:
        local = [p for p in local if not in_experts(p.name)] + experts
    found = gather_on_first(local, pipeline_group())
    return None if found is None else sorted(found, key=lambda p: int(p.name.split(".")[2]))


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
    """The projections of one linear's adapter, experts one by one. Collective over its tensor-parallel group."""
    place, parameters = linear.lora_placement(), linear.lora_parameters()
    pieces = {piece.name: (name, piece) for name, found in linear.lora_pieces().items() for piece in found}

    def read(linear: str, key: str) -> torch.Tensor:
        parameter, piece = pieces[f"{linear}.{key}"]
        return place.gather(piece, parameters[parameter].detach()).cpu()

    for one in linear.lora.one_by_one():
        yield from one.record.whole(one.name, partial(read, one.name))
