"""What the workers of the tests of a 4-bit base run, on every rank."""

from __future__ import annotations

import contextlib

import adapted
import nf4_oracle
import torch
import torch.distributed as dist
from harness import Layout
from megatron.core import parallel_state as mpu
from torch.multiprocessing.reductions import StorageWeakRef

from slime_plugins.lora import BaseQuant, LoRAConfig, apply_lora, merged, quantize_base
from slime_plugins.lora.adapters import iter_adapters
from slime_plugins.lora.names import hf_names
from slime_plugins.lora.quant import packed
from slime_plugins.lora.rehearsal.model import build_chunks

CONFIG = LoRAConfig(rank=nf4_oracle.RANK, alpha=nf4_oracle.ALPHA)


def chunks_of(layout: Layout, hf_dir, *, quant=BaseQuant(), config=CONFIG, first="quantize", build=build_chunks, **kwargs):
    """Adapted chunks on a packed base (``quant`` None: on the dense one), and the reports."""
    reports = []

    def apply(chunks):
        steps = [lambda: quantize_base(chunks, quant)] if quant is not None else []
        steps.append(lambda: apply_lora(chunks, config))
        for step in steps if first == "quantize" else reversed(steps):
            reports.append(step())

    return build(hf_dir, sequence_parallel=layout.sp, apply=apply, **kwargs), reports


def weights(layout: Layout, hf_dir, quant=BaseQuant(), dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Hugging Face name -> whole weight as it multiplies, of this pipeline stage."""
    chunks, _ = chunks_of(layout, hf_dir, quant=quant, dtype=dtype)
    found = {}
    for linear in iter_adapters(chunks):
        base, spec = linear.lora_base, linear.lora
        assert quant is None or all(isinstance(p, packed.PackedWeight) for p in base.parameters)
        for one, matrix in zip(spec.one_by_one(), base.matrices()):
            for part, name in zip(one.all_parts, hf_names(one.name)):
                found[name] = _whole(part.take(matrix), base)
    return found


def _whole(shard, base):
    if base.shards == 1:
        return shard
    shards = [torch.empty_like(shard) for _ in range(base.shards)]
    dist.all_gather(shards, shard.contiguous(), group=base.tp_group)
    return torch.cat(shards, dim=1 if base.parallel == "row" else 0)


def parity(layout: Layout, hf_dir, ref_logits, ref_grads, tokens, kwargs):
    """Errors of this rank against the oracle, relative to the largest entry."""
    chunks, _ = chunks_of(layout, hf_dir, **kwargs)
    adapted.set_adapters(chunks, CONFIG.layout, CONFIG.rank)
    model, logits = _pass(layout, chunks, tokens)
    errors = adapted.gradient_errors(model, ref_grads)
    if logits is not None:
        expected = ref_logits.chunk(mpu.get_data_parallel_world_size())[mpu.get_data_parallel_rank()]
        errors["logits"] = adapted.relative(logits - expected, expected)
    return errors


def _pass(layout, chunks, tokens):
    logits = adapted.run_schedule(chunks, tokens, microbatches=layout.pp, forward_only=True, collect_logits=True)
    model = adapted.wrap(chunks, distributed_optimizer=False)
    adapted.train_step(model, None, tokens, microbatches=layout.pp)
    return model, None if logits is None else adapted.gather_logits(logits, nf4_oracle_vocab(logits, layout))


def nf4_oracle_vocab(logits, layout) -> int:
    return logits.shape[-1] * layout.tp


def everything(layout: Layout, hf_dir, tokens, kwargs):
    """All that a packed and a dense base of the same weights must agree on, bit for bit."""
    chunks, _ = chunks_of(layout, hf_dir, **kwargs)
    adapted.set_adapters(chunks, CONFIG.layout, CONFIG.rank)
    with merged(chunks):
        inside = adapted.run_schedule(chunks, tokens, microbatches=layout.pp, forward_only=True, collect_logits=True)
    model, logits = _pass(layout, chunks, tokens)
    found = {"logits": logits, "merged": inside}
    for linear in iter_adapters(model):
        name = linear.lora.name
        found |= {f"{name} A": linear.lora_A.main_grad, f"{name} B": linear.lora_B.main_grad}
        found |= {f"{name} {i}": linear.lora_merged(i) for i in range(len(linear.lora_base.parameters))}
    return {key: None if value is None else value.clone() for key, value in found.items()}


@contextlib.contextmanager
def watched():
    """Yields a function: bytes alive of all dense weights that were made inside."""
    made, decode = [], packed.nf4.decode

    def watch(*args):
        dense = decode(*args)
        made.append(StorageWeakRef(dense.untyped_storage()))
        return dense

    def alive() -> int:
        storages = [torch.UntypedStorage._new_with_weak_ptr(ref.cdata) for ref in made]
        return sum(storage.nbytes() for storage in storages if storage is not None)

    packed.nf4.decode = watch
    try:
        yield alive
    finally:
        packed.nf4.decode = decode


def alive_bytes(layout: Layout, hf_dir, tokens, kwargs, breakage=None):
    """Dense bytes between forward and backward, and the most at any moment that a linear's forward is over."""
    chunks, _ = chunks_of(layout, hf_dir, **kwargs)
    with contextlib.ExitStack() as stack:
        if breakage is not None:
            stack.enter_context(breakage(chunks))
        alive = stack.enter_context(watched())
        mask = torch.ones(1, 1, *[tokens.shape[1] - 1] * 2, dtype=torch.bool).triu(1)
        positions = torch.arange(tokens.shape[1] - 1)[None].expand(len(tokens), -1)
        loss = chunks[0](tokens[:, :-1].contiguous(), positions, mask, labels=tokens[:, 1:].contiguous()).mean()
        between = alive()
        if breakage is None:
            loss.backward()
        return between, alive()
