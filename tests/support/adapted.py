"""What the workers of the distributed tests do with an adapted Megatron model. Runs on every rank."""

from __future__ import annotations

from functools import partial

import context_parallel
import torch
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from reference import adapter_values, draw
from views import iter_linears

from slime_plugins.lora import LoRAConfig, apply_lora
from slime_plugins.lora.names import hf_names, spellings
from slime_plugins.lora.rehearsal.model import build_chunks


def adapted_chunks(
    hf_dir, config: LoRAConfig, *, sp=False, vpp=None, recompute=None, dtype=torch.float32, layer_spec=None, **kwargs
):
    """Pipeline chunks with adapters, base frozen, not wrapped."""
    return build_chunks(
        hf_dir,
        dtype=dtype,
        sequence_parallel=sp,
        vpp=vpp,
        recompute=recompute,
        layer_spec=layer_spec,
        apply=partial(apply_lora, config=config, **kwargs),
    )


def wrap(chunks, *, bucket_size=None, distributed_optimizer=True):
    """Megatron DDP around every chunk."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=distributed_optimizer, bucket_size=bucket_size
    )
    return [
        DistributedDataParallel(get_model_config(chunk), config, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]


def optimizer_for(model, *, lr=1e-2, name="adam", distributed_optimizer=True, bf16=False, clip_grad=0.0):
    """Megatron's optimizer over the trainable parameters."""
    config = OptimizerConfig(
        optimizer=name,
        lr=lr,
        min_lr=lr,
        weight_decay=0.0,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=distributed_optimizer,
        clip_grad=clip_grad,
        sgd_momentum=0.0,
    )
    return get_megatron_optimizer(config, model)


def shard(linear, values: dict[str, tuple[torch.Tensor, torch.Tensor]]):
    """This rank's [A per stacked A], [B per part] out of whole (A, B) pairs by projection name, cut independently."""
    spec, tp, tp_size = linear.lora, linear.lora_tp_group.rank(), linear.lora_tp_size
    names = {name.rsplit(".", 1)[-1]: name for name in hf_names(spec.name)}
    As, Bs = [], []
    for part in spec.parts:
        A, B = next(values[name] for name in spellings(names[part.name]) if name in values)
        if spec.parallel == "row":
            A = A.chunk(tp_size, dim=1)[tp]
        elif spec.parallel == "column":
            B = B.chunk(tp_size, dim=0)[tp]
        As.append(A)
        Bs.append(B)
    return As, Bs


def rows_of_B(linear, index: int) -> torch.Tensor:
    """Rows of lora_B of one part, in Hugging Face order, found from the row numbers of the base weight.

    lora_B keeps the order of the base's rows: over the whole linear, or over each part.
    """
    spec = linear.lora
    rows = spec.parts[index].index()
    if spec.in_base_order:
        return rows
    return sum(part.size for part in spec.parts[:index]) + rows.argsort().argsort()


@torch.no_grad()
def set_adapters(chunks, layout: str, rank: int) -> None:
    """Give every adapter the reference's values."""
    values = {}
    for linear in iter_linears(chunks):
        spec, tp_size = linear.lora, linear.lora_tp_size
        columns = linear.weight.shape[1]
        for part, name in zip(spec.all_parts, hf_names(spec.name)):
            fan_in = columns * (tp_size if spec.parallel == "row" else 1)
            fan_out = part.size * (tp_size if spec.parallel == "column" else 1)
            values[name] = adapter_values(name, rank, fan_in, fan_out, layout)
    set_values(chunks, values)


@torch.no_grad()
def set_values(chunks, values: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Give every adapter this rank's shards of whole (A, B) pairs by projection name."""
    for linear in iter_linears(chunks):
        set_values_of(linear, values)


@torch.no_grad()
def set_values_of(linear, values: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """The same of one adapter."""
    As, Bs = shard(linear, values)
    linear.lora_A.copy_(torch.cat(As) if linear.lora.split else As[0])
    for i, B in enumerate(Bs):
        linear.lora_B[rows_of_B(linear, i)] = B


@torch.no_grad()
def randomize(chunks, scale=0.05) -> None:
    """Non-zero A and B that are equal at every parallelism: drawn whole, by name, then cut."""
    for linear in iter_linears(chunks):
        spec, tp_size = linear.lora, linear.lora_tp_size
        for i, part in enumerate(spec.parts):
            out = part.size * (tp_size if spec.parallel == "column" else 1)
            B = scale * draw(f"B {spec.name} {part.name}", out, spec.rank)
            B = B.chunk(tp_size)[linear.lora_tp_group.rank()] if spec.parallel == "column" else B
            linear.lora_B[rows_of_B(linear, i)] = B.to(linear.lora_B)


def run_schedule(model, tokens: torch.Tensor, *, microbatches=1, forward_only=False, collect_logits=False):
    """One pass of Megatron's schedule over this data-parallel rank's share of the samples, and of their tokens.

    Returns the mean loss over the whole batch (on the last stage, else None) and, if asked, logits [N, S, V].
    """
    dp, dp_rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
    mine = tokens.chunk(dp)[dp_rank].chunk(microbatches)
    iterators = [iter(mine) for _ in model]
    positions = context_parallel.positions(tokens.shape[1] - 1)[None]

    def loss_of(output):
        if collect_logits:
            return output.float().mean(), {"output": output.detach()}
        loss = output.float().mean()
        # The schedule multiplies by the context-parallel size what is a part of a sum there; this is a mean.
        return loss / mpu.get_context_parallel_world_size(), {"loss": loss.detach()}

    def forward_step(iterator, chunk):
        sample = next(iterator)
        labels = None if collect_logits else sample[:, positions[0] + 1]
        mask = torch.ones(1, 1, positions.shape[1], positions.shape[1], dtype=torch.bool).triu(1)
        return chunk(sample[:, positions[0]], positions.expand(len(sample), -1), mask, labels=labels), loss_of

    losses = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=model if len(model) > 1 else model[0],
        num_microbatches=microbatches,
        seq_length=tokens.shape[1] - 1,
        micro_batch_size=len(mine[0]),
        forward_only=forward_only,
    )
    if not mpu.is_pipeline_last_stage():
        return None
    if collect_logits:
        return torch.cat([item["output"] for item in losses])
    return torch.stack([item["loss"] for item in losses]).mean()


def train_step(model, optimizer, tokens, *, microbatches=1):
    """Zero grads, schedule, finalize, optimizer step. Returns (loss or None, grad norm)."""
    for chunk in model:
        chunk.zero_grad_buffer()
    if optimizer is not None:
        optimizer.zero_grad()
    loss = run_schedule(model, tokens, microbatches=microbatches)
    finalize_model_grads(model)
    grad_norm = optimizer.step()[1] if optimizer is not None else None
    return loss, grad_norm


def main_grads(linear) -> tuple[torch.Tensor, torch.Tensor]:
    """DDP's gradients of A and B; of stacked experts, one expert's."""
    return linear.owner.lora_A.main_grad[linear.index], linear.owner.lora_B.main_grad[linear.index]


def gradient_errors(model, ref_grads) -> dict[str, float]:
    """Worst error of this rank's A and B gradient shards against whole (dA, dB) pairs; number of adapters.

    Relative to the largest entry; where the reference is zero (an expert without tokens), the error itself.
    """
    errors = {"A": 0.0, "B": 0.0, "adapters": 0}
    for linear in iter_linears(model):
        As, Bs = shard(linear, ref_grads)
        dA = torch.cat(As) if linear.lora.split else sum(As)
        seen_A, seen_B = main_grads(linear)
        errors["A"] = max(errors["A"], relative(seen_A - dA, dA))
        for i, dB in enumerate(Bs):
            errors["B"] = max(errors["B"], relative(seen_B[rows_of_B(linear, i)] - dB, dB))
        errors["adapters"] += 1
    return errors


def gather_logits(logits: torch.Tensor | None, vocab_size: int) -> torch.Tensor | None:
    """[N, S, V/T] shards -> [N, S, V] on every TP rank of the last stage."""
    if logits is None:
        return None
    group = mpu.get_tensor_model_parallel_group()
    shards = [torch.empty_like(logits) for _ in range(group.size())]
    torch.distributed.all_gather(shards, logits.contiguous(), group=group)
    return torch.cat(shards, dim=-1)[..., :vocab_size]


def relative(error: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest error over the largest reference value; the error itself if the reference is zero."""
    largest = reference.abs().max()
    return (error.abs().max() / (largest if largest > 0 else 1)).item()
