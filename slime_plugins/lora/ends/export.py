"""Adapters of a running, sharded model -> a PEFT adapter directory."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from slime_plugins.lora.adapters import config_of, iter_linears
from slime_plugins.lora.inject import expert_group, pipeline_group
from slime_plugins.lora.layers import LoRALinear, OneExpert
from slime_plugins.lora.names import hf_names, in_experts
from slime_plugins.lora.peft.directory import write_adapter
from slime_plugins.lora.peft.form import to_peft
from slime_plugins.lora.projections import Projection


def export_peft(
    model, out_dir: str | os.PathLike, *, hf_checkpoint: str | os.PathLike, moe_format: str = "per-expert"
) -> Path:
    """Write the model's adapters as a PEFT directory, from rank 0. Call on all ranks.

    Args:
        model: a module or the list of this rank's pipeline chunks, wrapped or not.
        hf_checkpoint: directory of the base, named in ``adapter_config.json``.
        moe_format: of routed experts: ``per-expert`` (vLLM, SGLang, PEFT) or ``fused`` (PEFT); see ``moe_form``.
    Collectives:
        all_gather over each tensor- and expert-tensor-parallel group, gather_object over each expert- and
        pipeline-parallel group, one all_gather_object.
    Returns:
        ``out_dir``, complete on disk when any rank returns.
    Raises:
        UsageError, ValueError, OSError: on every rank alike, when an adapter is missing, empty or not finite
            (naming the tensor), the base is trainable, or the directory cannot be written. Nothing is left
            half-written.
    """
    projections = gather_projections(model)
    problem = _trained_base(model)
    if problem is None and projections is not None and _is_writer():
        try:
            adapter = to_peft(projections, hf_checkpoint, dropout=config_of(model).dropout, moe_format=moe_format)
            write_adapter(out_dir, *adapter, base=hf_checkpoint)
        except (ValueError, OSError) as error:
            problem = error
    _raise_everywhere(problem)
    return Path(out_dir)


def _trained_base(model) -> ValueError | None:
    """A base that trains with the adapters would be left behind by a file of adapters alone."""
    for chunk in model if isinstance(model, (list, tuple)) else [model]:
        for name, parameter in chunk.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                return ValueError(
                    f"{name} is trainable, so a PEFT adapter would not hold all that was trained; save the whole "
                    "model instead, or train with the base frozen (--lora-only-trainable)"
                )
    return None


def gather_projections(model) -> list[Projection] | None:
    """Every adapted projection whole, in layer order, on rank 0. Other ranks get a part of them, or None."""
    local = [projection for linear in iter_linears(model) for projection in _gather_linear(linear)]
    # Rank 0 is first in its expert group, and so are its peers of the other pipeline stages in theirs.
    experts = _gather_on_first([p for p in local if in_experts(p.name)], expert_group())
    if experts is not None:
        local = [p for p in local if not in_experts(p.name)] + experts
    found = _gather_on_first(local, pipeline_group())
    return None if found is None else sorted(found, key=lambda p: int(p.name.split(".")[2]))


def _gather_on_first(items: list, group) -> list | None:
    """The items of all ranks, in rank order, on the first rank of a group; None on the others."""
    if group is None:
        return items
    gathered = [None] * group.size() if group.rank() == 0 else None
    dist.gather_object(items, gathered, dst=dist.get_global_rank(group, 0), group=group)
    return None if gathered is None else [item for rank in gathered for item in rank]


def _gather_linear(linear: LoRALinear | OneExpert) -> list[Projection]:
    spec = linear.lora
    names = {name.rsplit(".", 1)[-1]: name for name in hf_names(spec.name)}
    projections = []
    for i, part in enumerate(spec.parts):
        A, B = spec.part_A(linear.lora_A.detach(), i), spec.part_B(linear.lora_B.detach(), i)
        if spec.parallel == "column":
            B = _gather_tp(B, linear.lora_tp_group, dim=0)
        elif spec.parallel == "row":
            A = _gather_tp(A, linear.lora_tp_group, dim=1)
        rank = spec.ranks[i]
        A, B = A[:rank].cpu(), B[:, :rank].cpu()
        projections.append(Projection(names[part.name], A.clone(), B.clone(), spec.scalings[i]))
    return projections


def _gather_tp(shard: torch.Tensor, group, dim: int) -> torch.Tensor:
    if group.size() == 1:
        return shard
    shards = [torch.empty_like(shard, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return torch.cat(shards, dim=dim)


def _is_writer() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _raise_everywhere(problem: Exception | None) -> None:
    """Raise the first rank's problem on every rank, so that none goes on, and none waits for one that has stopped."""
    if dist.is_initialized():
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        problem = next((p for p in problems if p is not None), None)
    if problem is not None:
        raise problem
