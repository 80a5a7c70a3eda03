"""What LoRA adds to slime's metrics of a training step, beside loss and grad norm.

train/lora/update_norm      |scaling B A|, over all adapters
train/lora/update_ratio     |scaling B A| / |W|, mean over up to 8 linears per pipeline stage
train/lora/dead             adapters whose B A is zero: after a step, none should be
train/lora/sync_bytes       what one engine received in the last weight sync
train/lora/sync_seconds     how long it took
train/lora/sync_lost        share of the merged update (sum of |scaling B A|) on weights that rounding to the
                            base's dtype has left as they were
"""

from __future__ import annotations

import functools
import inspect

import torch
import torch.distributed as dist

from slime_plugins.lora.adapters import iter_adapters
from slime_plugins.lora.layers import LoRALinear
from slime_plugins.lora.slime.policies import has_adapters

SAMPLED = 8
"""Linears per pipeline stage whose base norm is read, once."""


def measuring(train_one_step):
    """Hook: one optimizer step. The adapter's numbers join the step's losses, which slime logs on one rank."""
    signature = inspect.signature(train_one_step)

    @functools.wraps(train_one_step)
    def hooked(*args, **kwargs):
        losses, *rest = train_one_step(*args, **kwargs)
        model = signature.bind(*args, **kwargs).arguments["model"]
        if has_adapters(model):
            measured = measure(model)
            if losses:  # the last pipeline stage's; the others have none to log
                losses = {**losses, **{f"lora/{name}": value for name, value in measured.items()}}
        return (losses, *rest)

    return hooked


@torch.no_grad()
def measure(model) -> dict[str, float]:
    """The numbers of the module's docstring, without ``train/lora/``.

    Collectives:
        one all_reduce over each tensor-parallel group, two over the pipeline group.
    """
    from megatron.core import mpu

    linears = list(iter_adapters(model))
    updates = _sum_over_shards(linears, [update_square(linear) for linear in linears])
    sampled = linears[:: max(1, -(-len(linears) // SAMPLED))]
    bases = _base_squares(sampled)
    ratios = [(updates[linears.index(linear)] / base).sqrt() for linear, base in zip(sampled, bases)]
    sync = getattr(model[0], "lora_last_sync", None)
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    lost = torch.tensor([sync.update, sync.lost] if sync else [0.0, 0.0], device=device)
    _all_reduce(lost, mpu.get_tensor_model_parallel_group())
    sums = torch.tensor(
        [
            sum(updates, torch.tensor(0.0)),
            sum(ratios, torch.tensor(0.0)),
            len(ratios),
            sum(update == 0 for update in updates),
            sync.bytes if sync else 0.0,
            *lost.tolist(),
        ],
        dtype=torch.float64,
        device=device,
    )
    seconds = torch.tensor([sync.seconds if sync else 0.0], device=device)
    _all_reduce(sums, mpu.get_pipeline_model_parallel_group())
    _all_reduce(seconds, mpu.get_pipeline_model_parallel_group(), dist.ReduceOp.MAX)
    update, ratio, count, dead, size, sent, gone = sums.tolist()
    measured = {"update_norm": update**0.5, "update_ratio": ratio / max(count, 1), "dead": dead}
    if size:
        measured.update(sync_bytes=size, sync_seconds=seconds.item())
        if sent:
            measured["sync_lost"] = gone / sent
    return measured


def update_square(linear: LoRALinear) -> torch.Tensor:
    """Sum of squares of scaling B A on this rank, from rank-sized products: |BA|^2 = sum((B^T B) * (A A^T)).

    One of A and B is sharded over tensor-parallel ranks, the other whole: the ranks' values add up.
    """
    A, B = linear.lora_A.float(), linear.lora_B.float()
    total = torch.zeros((), device=A.device)
    for block in linear.lora.blocks:
        A_RI, B_OR = A[block.cols], B[block.rows]
        total += block.scaling**2 * ((B_OR.t() @ B_OR) * (A_RI @ A_RI.t())).sum()
    return total.clamp_(min=0)


def _base_squares(linears: list[LoRALinear]) -> list[torch.Tensor]:
    """Sum of squares of whole base weights; read once, for the base does not change."""
    if linears and not hasattr(linears[0], "lora_base_square"):
        squares = [linear.weight.float().square().sum() for linear in linears]
        for linear, square in zip(linears, _sum_over_shards(linears, squares)):
            linear.lora_base_square = square
    return [linear.lora_base_square for linear in linears]


def _sum_over_shards(linears: list[LoRALinear], values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Add one number per linear over its tensor-parallel group; every rank of a group has the same linears."""
    groups: dict[int, tuple] = {}
    for i, linear in enumerate(linears):
        groups.setdefault(id(linear.lora_tp_group), (linear.lora_tp_group, []))[1].append(i)
    summed = list(values)
    for group, members in groups.values():
        stacked = torch.stack([values[i] for i in members])
        _all_reduce(stacked, group)
        for i, value in zip(members, stacked.cpu()):
            summed[i] = value
    return summed


def _all_reduce(tensor: torch.Tensor, group, op=dist.ReduceOp.SUM) -> None:
    if group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
