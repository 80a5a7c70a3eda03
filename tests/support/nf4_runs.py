"""What the workers of the tests of a 4-bit base run, on every rank."""

from __future__ import annotations

import contextlib
from functools import partial

import adapted
import moe_models
import moe_runs
import nf4_oracle
import torch
import torch.distributed as dist
from harness import Layout
from megatron.core import parallel_state as mpu
from torch.multiprocessing.reductions import StorageWeakRef

from slime_plugins.lora import BaseQuant, LoRAConfig, adapters_disabled, apply_lora, merged, quantize, quantize_base
from slime_plugins.lora.adapters import iter_adapters
from slime_plugins.lora.checkpoint.model import fingerprint_of_model
from slime_plugins.lora.ends.export import gather_projections
from slime_plugins.lora.names import hf_names, spellings
from slime_plugins.lora.quant import hold, packed
from slime_plugins.lora.rehearsal.model import build_chunks

NF4 = BaseQuant()
CONFIG = LoRAConfig(rank=nf4_oracle.RANK, alpha=nf4_oracle.ALPHA)


def chunks_of(
    layout: Layout, hf_dir, *, quant=NF4, config=CONFIG, first="quantize", build=build_chunks, codes_of=None, **kwargs
):
    """Adapted chunks on a packed base (``quant`` None: on the dense one), and the reports.

    Both by taps, which a packed base always has: the same products in the same order.
    """
    reports = []

    def apply(chunks):
        steps = [lambda: quantize_base(chunks, quant, codes_of=codes_of)] if quant is not None else []
        steps.append(lambda: apply_lora(chunks, config, linears="auto" if quant is not None else "taps"))
        for step in steps if first == "quantize" else reversed(steps):
            reports.append(step())

    return build(hf_dir, sequence_parallel=layout.sp, apply=apply, **kwargs), reports


def moe_parity(layout: Layout, hf_dir, te, config, values, ref_logits, ref_grads, weights):
    """Errors of this rank as in ``parity``, classes of its linears, and which weights differ from ``weights``."""
    with moe_models.sizes(**nf4_oracle.MOE_SIZES):
        build = partial(moe_models.build_chunks, te=te, moe_grouped_gemm=te)
        chunks, _ = chunks_of(layout, hf_dir, config=config, build=build)
        adapted.set_values(chunks, values)
        found = whole_weights(chunks)
        found = {next(one for one in spellings(name) if one in weights): found[name] for name in found}
        model, logits = _pass(layout, chunks, moe_runs.TOKENS)
        errors = adapted.gradient_errors(model, ref_grads)
    errors["classes"] = {type(linear).__name__ for linear in iter_adapters(model)}
    errors["weights"] = set(found)
    errors["differ"] = [name for name, weight in found.items() if not torch.equal(weight, weights[name])]
    if logits is not None:
        expected = ref_logits.chunk(mpu.get_data_parallel_world_size())[mpu.get_data_parallel_rank()]
        errors["logits"] = adapted.relative(logits - expected, expected)
    return errors


def moe_weights(layout: Layout, dense, codes, te):
    """Hugging Face name -> whole weight as it multiplies, of this rank's experts and of all else."""
    with moe_models.sizes(**nf4_oracle.MOE_SIZES):
        build = partial(moe_models.build_chunks, te=te, moe_grouped_gemm=te)
        chunks, _ = chunks_of(layout, dense, codes_of=codes, build=build)
        return whole_weights(chunks)


def train(layout: Layout, hf_dir, quant, steps):
    """Losses, norms and this rank's adapters after some steps of SGD."""
    chunks, _ = chunks_of(layout, hf_dir, quant=quant)
    before = fingerprint_of_model(chunks)
    model = adapted.wrap(chunks, distributed_optimizer=False)
    optimizer = adapted.optimizer_for(model, lr=0.1, name="sgd", clip_grad=1.0, distributed_optimizer=False)
    losses, norms = [], []
    for step in range(steps):
        tokens = torch.randint(4, 128, (4, 17), generator=torch.Generator().manual_seed(step))
        loss, norm = adapted.train_step(model, optimizer, tokens)
        losses.append(loss.item())
        norms.append(norm)
    assert fingerprint_of_model(model) == before
    return (
        losses,
        norms,
        {f"{p.name}.{half}": getattr(p, half) for p in gather_projections(model) or () for half in "AB"},
    )


def weights(layout: Layout, hf_dir, quant=NF4, dtype=torch.float32, codes_of=None) -> dict[str, torch.Tensor]:
    """Hugging Face name -> whole weight as it multiplies, of this pipeline stage."""
    return whole_weights(chunks_of(layout, hf_dir, quant=quant, dtype=dtype, codes_of=codes_of)[0])


def weights_of_statistics_per_shard(layout: Layout, *args):
    """``weights`` where every rank nests its own scales, as a trainer that knows of no projections would."""
    working = vars(quantize).copy()
    quantize._gathered, quantize._corner = (lambda shard, base: shard), (lambda *_: (0, 0))
    try:
        return weights(layout, *args)
    finally:
        vars(quantize).update(working)


def whole_weights(chunks) -> dict[str, torch.Tensor]:
    found = {}
    for linear in iter_adapters(chunks):
        base, spec = linear.lora_base, linear.lora
        assert all(isinstance(parameter, packed.PackedWeight) for parameter in base.parameters)
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
    """The model in DDP after one backward, and its logits before (None but on the last stage)."""
    logits = adapted.run_schedule(chunks, tokens, microbatches=layout.pp, forward_only=True, collect_logits=True)
    model = adapted.wrap(chunks, distributed_optimizer=False)
    adapted.train_step(model, None, tokens, microbatches=layout.pp)
    return model, None if logits is None else adapted.gather_logits(logits, logits.shape[-1] * layout.tp)


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


BREAKAGES = {
    "": {},
    "not freed": {"_free": lambda dense: None},
    "saved": {"_free": lambda dense: None, "_tickets": lambda kept: contextlib.nullcontext()},
}


def alive_bytes(layout: Layout, hf_dir, tokens, kwargs, breakage=""):
    """Dense bytes of the base: the most when a linear's forward is over, between forward and backward, after it."""
    chunks, _ = chunks_of(layout, hf_dir, **kwargs)
    working = vars(hold).copy()
    vars(hold).update(BREAKAGES[breakage])
    try:
        with watched() as alive:
            after_forward = []
            for linear in iter_adapters(chunks):
                linear.register_forward_hook(lambda *_: after_forward.append(alive()))
            mask = torch.ones(1, 1, *[tokens.shape[1] - 1] * 2, dtype=torch.bool).triu(1)
            positions = torch.arange(tokens.shape[1] - 1)[None].expand(len(tokens), -1)
            loss = chunks[0](tokens[:, :-1].contiguous(), positions, mask, labels=tokens[:, 1:].contiguous()).mean()
            between = alive()
            loss.backward()
            return max(after_forward), between, alive()
    finally:
        vars(hold).update(working)


def facts(layout: Layout, hf_dir, tokens, quant):
    """Reports, fingerprint, bytes, what is left when adapters are off and after ``merged``, names of parameters."""
    chunks, reports = chunks_of(layout, hf_dir, quant=quant)
    adapted.set_adapters(chunks, CONFIG.layout, CONFIG.rank)

    def logits():
        return adapted.run_schedule(chunks, tokens, forward_only=True, collect_logits=True)

    on = logits()
    with adapters_disabled(chunks):
        off = logits()
    with merged(chunks):
        inside = logits()
    weights = [p for chunk in chunks for p in chunk.parameters() if isinstance(p, packed.PackedWeight)]
    return {
        "merged": adapted.relative(inside - on, on),
        "restored": torch.equal(logits(), on),
        "off": off,
        "report": str(reports[-1]),
        "quantised": reports[0] if quant is not None else None,
        "fingerprint": fingerprint_of_model(chunks),
        "names": {name: tuple(p.shape) for chunk in chunks for name, p in chunk.named_parameters()},
        "bytes": sum(p.packed.nbytes for p in weights),
        "parameters": sum(p.numel() for p in weights),
    }


def refused(layout: Layout, hf_dir, quant, how):
    """What ``quantize_base`` raises, and whether the model is as it was."""
    (chunk,) = build_chunks(hf_dir, sequence_parallel=layout.sp)
    if how.get("trains"):
        apply_lora(chunk, CONFIG, freeze_base=False)
    if how.get("twice"):
        quantize_base(chunk)
    before = dict(chunk.named_parameters())
    try:
        quantize_base(adapted.wrap([chunk]) if how.get("wrapped") else [chunk], quant)
    except (ValueError, RuntimeError) as error:
        after = dict(chunk.named_parameters())
        assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
        return type(error).__name__, str(error)
    return None


def tensor_facts(layout: Layout, hf_dir):
    """What a packed weight does as a tensor."""
    (chunk,), _ = chunks_of(layout, hf_dir)
    chunk.to("cpu")  # Megatron and users call it; nothing may become dense
    chunk.float()
    linear = next(iter_adapters(chunk))
    weight = linear._parameters["weight"]
    dense = packed.dense_of(weight)
    found = {
        "packed": isinstance(weight, packed.PackedWeight) and isinstance(weight, torch.nn.Parameter),
        "looks": (weight.shape, weight.dtype, weight.requires_grad, weight.device.type),
        "marks": weight.tensor_model_parallel,
        "values": torch.equal(weight, dense) and torch.equal(weight[:3].t(), dense[:3].t()),
        "detached": isinstance(weight.detach(), packed.PackedWeight) and isinstance(weight.data, packed.PackedWeight),
        "cloned": torch.equal(weight.clone(), dense),
        "cast": torch.equal(weight.to(torch.bfloat16), dense.bfloat16()),
        "said": repr(weight),
    }
    for name, write in {
        "add": lambda: weight.add_(1),
        "copy": lambda: weight.copy_(dense),
        "data": lambda: weight.data.mul_(2),
        "zeros": lambda: torch.nn.init.zeros_(weight),
    }.items():
        try:
            with torch.no_grad():
                write()
        except RuntimeError as error:
            found[name] = str(error)
    found["unharmed"] = torch.equal(weight, dense)
    chunk.bfloat16()
    try:
        linear(torch.zeros(1, 1, weight.shape[1], dtype=torch.bfloat16))
    except RuntimeError as error:
        found["cast model"] = str(error)
    return found
