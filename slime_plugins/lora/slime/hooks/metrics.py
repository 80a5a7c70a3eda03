"""What LoRA adds to slime's metrics of a training step, beside loss and grad norm.

train/lora/update_norm      |scaling B A|, over all adapters
train/lora/update_ratio     |scaling B A| / |W|, mean over up to 8 linears per pipeline stage
train/lora/dead             adapters whose B A is zero: after a step, none should be
train/lora/sync_bytes       what one engine received in the last weight sync
train/lora/sync_seconds     how long it took
train/lora/sync_lost        share of the merged update (sum of |scaling B A|) on weights that rounding to the
                            base's dtype has left as they were; of engines that run a quantised copy, how far their
                            weights are off the update after slime's quantiser (``quantised_sync``)
"""

from __future__ import annotations

import functools
import inspect
import logging

import torch
import torch.distributed as dist

from slime_plugins.lora.adapters import config_of, has_adapters, iter_adapters, iter_token_rows, state_of
from slime_plugins.lora.layers import LoRALinear
from slime_plugins.lora.quantize import base_quant_of
from slime_plugins.lora.slime.hooks import gkd, quantised_sync
from slime_plugins.lora.tokens import sum_over_stages

logger = logging.getLogger(__name__)

ANOTHER_BASE = 0.1
"""Mean |log-prob difference|: bf16 noise is 0.03; an adapter of a 4-bit base on the dense one 0.59 (docs/qlora.md)."""
TOLD = 0.1
"""``sync_lost`` of a quantised copy from which on it is said, once."""
SAMPLED = 8
"""Linears per pipeline stage whose base norm is read, once."""


def measuring(train_one_step):
    """Hook: one optimizer step. The adapter's numbers join the step's losses, which slime logs on one rank."""
    signature = inspect.signature(train_one_step)

    @functools.wraps(train_one_step)
    def hooked(*args, **kwargs):
        model = signature.bind(*args, **kwargs).arguments["model"]
        if has_adapters(model):
            sum_over_stages(model)
        losses, *rest = train_one_step(*args, **kwargs)
        if has_adapters(model):
            gkd.after_step(model)
            measured = measure(model)
            _warn_of_another_base(model, losses)
            _warn_of_loss(model, losses, measured)
            if losses:  # the last pipeline stage's; the others have none to log
                losses = {**losses, **{f"lora/{name}": value for name, value in measured.items()}}
        return (losses, *rest)

    return hooked


def _warn_of_another_base(model, losses) -> None:
    """Once, at the first step on a 4-bit base: do the engines answer as the trainer does?"""
    key, state = "train_rollout_logprob_abs_diff", state_of(model)
    if not losses or key not in losses or state.compared_with_engines or base_quant_of(model) is None:
        return
    state.compared_with_engines = True
    difference = float(losses[key])
    if difference > ANOTHER_BASE:
        logger.warning(
            "LoRA: train_rollout_logprob_abs_diff is %.3f at the first step, more than the %.1f that is to be "
            "expected of engines on the 4-bit base: do they hold its dequantised weights (--lora-sync merged)?",
            difference,
            ANOTHER_BASE,
        )


def _warn_of_loss(model, losses, measured: dict[str, float]) -> None:
    """Once, after the first sync of an update that is not zero into engines that run a quantised copy."""
    state = state_of(model)
    loss, lost = getattr(state.last_sync, "loss", None), measured.get("sync_lost", 0.0)
    if losses and loss is not None and lost > TOLD and not state.told_of_loss:
        state.told_of_loss = True
        logger.warning("LoRA: %s", quantised_sync.said(loss.scheme, lost))


@torch.no_grad()
def measure(model) -> dict[str, float]:
    """The numbers of the module's docstring, without ``train/lora/``.

    Collectives:
        one all_reduce over each tensor-parallel and expert-parallel group and over all ranks, two over the pipeline
        group.
    """
    from megatron.core import mpu

    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    linears = list(iter_adapters(model))
    updates = _sum_over_shards(linears, [linear.lora_update_squares() for linear in linears])
    bases = _base_squares(model, linears[:: max(1, -(-len(linears) // SAMPLED))], device)
    sums = torch.zeros(
        2, 4, dtype=torch.float64, device=device
    )  # dense and experts: update, ratios, their number, dead
    for linear, update in zip(linears, updates):
        row = sums[int(linear.lora.experts is not None)]
        row[0] += update.sum()
        row[3] += (update == 0).sum()
        if linear in bases:
            row[1] += (update / bases[linear]).sqrt().sum()
            row[2] += update.numel()
    _all_reduce(sums[1], mpu.get_expert_model_parallel_group())
    sync = state_of(model).last_sync
    # Shards of one tensor-parallel group; a share of sums, for which experts need no exact weighing.
    loss = sync.loss if sync else None
    counts = [sync.rounding.size, sync.rounding.lost, len(sync.merged)] if sync else [0.0, 0.0, 0]
    counts += [loss.error, loss.update, loss.matrices] if loss else [0.0, 0.0, 0]
    sent = torch.tensor([float(count) for count in counts], dtype=torch.float64, device=device)
    _all_reduce(sent, mpu.get_tensor_model_parallel_group())
    size = torch.tensor([sync.bytes if sync else 0.0], dtype=torch.float64, device=device)
    read = torch.tensor([sync.read_bytes if sync else 0.0], dtype=torch.float64, device=device)
    dist.all_reduce(read)
    size += read / mpu.get_pipeline_model_parallel_world_size()
    totals = torch.cat([sums.sum(0), sent, size])
    seconds = torch.tensor([sync.seconds if sync else 0.0], device=device)
    _all_reduce(totals, mpu.get_pipeline_model_parallel_group())
    _all_reduce(seconds, mpu.get_pipeline_model_parallel_group(), dist.ReduceOp.MAX)
    update, ratios, count, dead, sent_update, lost, merged, error, sent_squares, compared, size = totals.tolist()
    measured = {"update_norm": update**0.5, "update_ratio": ratios / max(count, 1), "dead": dead}
    if size:
        measured.update(sync_bytes=size, sync_seconds=seconds.item())
    if config_of(model).trainable_token_indices:
        measured["rows_norm"] = _rows_norm(model, device)
    # The very first update is zero, and none of it is lost.
    if compared:
        measured["sync_lost"] = (error / (sent_squares or 1)) ** 0.5
    elif merged and loss is None:
        measured["sync_lost"] = lost / (sent_update or 1)
    return measured


def _rows_norm(model, device) -> float:
    """Norm of the change of the trained vocabulary rows; of tied ones once. One all_reduce over the pipeline group."""
    from megatron.core import mpu

    total = torch.zeros(1, dtype=torch.float64, device=device)
    for rows in iter_token_rows(model):
        if rows.lora_table and not rows.lora_copy:
            total += rows.lora_rows.double().square().sum()
    _all_reduce(total, mpu.get_pipeline_model_parallel_group())
    return total.sqrt().item()


def _base_squares(model, linears: list[LoRALinear], device) -> dict[LoRALinear, torch.Tensor]:
    """Sum of squares of whole base weights; read once, for the base does not change."""
    known = state_of(model).base_squares
    if linears and not known:
        squares = [  # linear by linear: matrices of a packed base are made here
            torch.stack([w.float().square().sum() for w in linear.lora_base.matrices()]) for linear in linears
        ]
        known.update(zip(linears, (square.to(device) for square in _sum_over_shards(linears, squares))))
    return known


def _sum_over_shards(linears: list[LoRALinear], values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Add vectors, one per linear, over its tensor-parallel group; every rank of a group has the same linears."""
    groups: dict[int, tuple] = {}
    for i, linear in enumerate(linears):
        if linear.lora_base.shards > 1:
            groups.setdefault(id(linear.lora_group), (linear.lora_group, []))[1].append(i)
    summed = list(values)
    for group, members in groups.values():
        flat = torch.cat([values[i] for i in members])
        _all_reduce(flat, group)
        for i, value in zip(members, flat.split([values[i].numel() for i in members])):
            summed[i] = value
    return summed


def _all_reduce(tensor: torch.Tensor, group, op=dist.ReduceOp.SUM) -> None:
    if group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)
