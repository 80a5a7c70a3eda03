"""What the workers of the tests with experts do. Runs on every rank."""

from __future__ import annotations

import contextlib
from functools import partial

import adapted
import moe_models
import reference
import torch
import torch.distributed as dist
from harness import Layout
from megatron.core import parallel_state as mpu
from views import iter_linears

from slime_plugins.lora import adapters_disabled, apply_lora, merged
from slime_plugins.lora.adapters import iter_adapters

RANK, ALPHA = 4, 6.0
# ETP defaults to TP in Megatron; TP needs sequence parallelism there while training.
SPLITS = {
    "dp4": {},
    "ep2": dict(ep=2, etp=1),
    "ep4": dict(ep=4, etp=1),
    "tp2-etp1": dict(tp=2, sp=True, etp=1),
    "tp2-etp2": dict(tp=2, sp=True, etp=2),
    "tp2-ep2-etp1": dict(tp=2, sp=True, ep=2, etp=1),
    "tp2-ep2-etp2": dict(tp=2, sp=True, ep=2, etp=2),
    "tp1-etp2": dict(etp=2),
    "tp1-ep2-etp2": dict(ep=2, etp=2),
    "pp2-ep2": dict(pp=2, ep=2, etp=1),
}
TOKENS = reference.batch(moe_models.VOCAB, num_samples=4, length=12)


def chunks_of(layout: Layout, hf_dir, te, config, values=None, **overrides):
    apply = partial(apply_lora, config=config) if config is not None else None
    settings = dict(moe_grouped_gemm=te, sequence_parallel=layout.sp) | overrides
    chunks = moe_models.build_chunks(hf_dir, te=te, apply=apply, **settings)
    if values is not None:
        adapted.set_values(chunks, values)
    return chunks


def logits_of(layout: Layout, chunks):
    logits = adapted.run_schedule(chunks, TOKENS, microbatches=layout.pp, forward_only=True, collect_logits=True)
    return adapted.gather_logits(logits, moe_models.VOCAB)


def base_step(layout: Layout, hf_dir):
    """One step of training without adapters."""
    model = adapted.wrap(chunks_of(layout, hf_dir, True, None), distributed_optimizer=False)
    adapted.train_step(model, None, TOKENS, microbatches=layout.pp)


def parity(layout: Layout, hf_dir, te, config, values, ref_logits, ref_grads, overrides):
    """Errors of this rank, relative to the largest entry: logits (last stage), worst A and B gradient shard."""
    chunks = chunks_of(layout, hf_dir, te, config, values, **overrides)
    logits = logits_of(layout, chunks)
    model = adapted.wrap(chunks, distributed_optimizer=False)
    optimizer = adapted.optimizer_for(model, name="sgd", lr=0.0, distributed_optimizer=False, clip_grad=1.0)
    adapted.train_step(model, None, TOKENS, microbatches=layout.pp)
    errors = adapted.gradient_errors(model, ref_grads)
    errors["grad_norm"] = optimizer.step()[1]
    errors["classes"] = {type(linear).__name__ for linear in iter_adapters(model)}
    if logits is not None:
        dp_rank, dp = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        expected = ref_logits.chunk(dp)[dp_rank]
        errors["logits"] = adapted.relative(logits - expected, expected)
    return errors


@contextlib.contextmanager
def single_grouped_weights():
    """Inside, TE holds the experts of a linear in one parameter, as its newer versions can."""
    from transformer_engine.pytorch import GroupedLinear

    init, made = GroupedLinear.__init__, []

    def with_single_weight(self, *args, **kwargs):
        init(self, *args, **kwargs, single_grouped_weight=True)
        made.append(self.weight.dim())

    GroupedLinear.__init__ = with_single_weight
    try:
        yield
    finally:
        GroupedLinear.__init__ = init
        assert set(made) == {3}


def parity_of_single_weights(layout: Layout, *args):
    with single_grouped_weights():
        return parity(layout, *args)


def train(layout: Layout, hf_dir, te, config, values, steps):
    """Every A and B after some steps of SGD, as ``shards_of``."""
    model = adapted.wrap(chunks_of(layout, hf_dir, te, config, values), distributed_optimizer=False)
    optimizer = adapted.optimizer_for(model, name="sgd", lr=1e-2, distributed_optimizer=False)
    for _ in range(steps):
        adapted.train_step(model, optimizer, TOKENS, microbatches=layout.pp)
    return shards_of(model)


def whole(results) -> dict:
    """The shards of all ranks put together; replicas must be equal bit for bit."""
    shards: dict = {}
    for found in results:
        for key, (tensor, tp_rank, dim) in found.items():
            known = shards.setdefault(key, (dim, {}))[1].setdefault(0 if dim is None else tp_rank, tensor)
            assert torch.equal(known, tensor), f"{key}: replicas differ"
    return {
        key: pieces[0] if dim is None else torch.cat([pieces[i] for i in sorted(pieces)], dim)
        for key, (dim, pieces) in shards.items()
    }


def groups(layout: Layout, hf_dir, config):
    """``allreduce`` marks of expert and dense adapters; do experts start from the A of their number?"""
    chunks = chunks_of(layout, hf_dir, True, config)
    alone = {}
    for linear in iter_linears(chunks):
        alone[linear.lora.name] = linear.lora_A.detach().clone()
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, {n: A for n, A in alone.items() if ".experts." in n and "fc1" in n})
    every = {}
    start = all(torch.equal(every.setdefault(n, A), A) for found in gathered for n, A in found.items())
    start = (
        start and len(every) == 2 * moe_models.EXPERTS and len({A.sum().item() for A in every.values()}) == len(every)
    )
    marks: dict[bool, set] = {True: set(), False: set()}
    for linear in iter_adapters(chunks):
        marks[linear.lora.experts is not None] |= {linear.lora_A.allreduce, linear.lora_B.allreduce}
    return marks[True], marks[False], start


def switched_off_and_merged(layout: Layout, hf_dir, te, config, values):
    """Base bit for bit when off? Error of the merged base against the adapters. Base's bits back afterwards?"""
    base = logits_of(layout, chunks_of(layout, hf_dir, te, None))
    chunks = chunks_of(layout, hf_dir, te, config, values)
    before = [w.detach().clone() for w in chunks[0].parameters()]
    on = logits_of(layout, chunks)
    assert not torch.equal(on, base)
    with adapters_disabled(chunks):
        off = torch.equal(logits_of(layout, chunks), base)
    with merged(chunks):
        error = adapted.relative(logits_of(layout, chunks) - on, on)
    return off, error, all(torch.equal(a, b) for a, b in zip(before, chunks[0].parameters()))


def adapted_paths(layout: Layout, hf_dir, config):
    """Paths in the layer of this rank's adapted linears, and the report."""
    reports = []
    chunks = moe_models.build_chunks(
        hf_dir,
        te=True,
        moe_grouped_gemm=True,
        sequence_parallel=layout.sp,
        apply=lambda chunks: reports.append(apply_lora(chunks, config)),
    )
    del chunks
    return [module.name.split(".", 3)[3] for module in reports[0].modules], reports[0]


def with_unknown_linear(layout: Layout, hf_dir, config):
    def apply(chunks):
        for layer in chunks[0].decoder.layers[-1:]:
            layer.mlp.fc1_latent_proj = torch.nn.Linear(4, 4)
        reports.append(apply_lora(chunks, config))

    reports: list = []
    moe_models.build_chunks(hf_dir, te=True, moe_grouped_gemm=True, apply=apply)
    return reports[0]


def router(layout: Layout, hf_dir, config):
    """Error of the adapted logits against a base whose router weights hold W + scaling B A."""
    chunks = chunks_of(layout, hf_dir, True, config)
    with torch.no_grad():
        for linear in iter_adapters(chunks):
            linear.lora_B.copy_(reference.draw(linear.lora.name, *linear.lora_B.shape))
    on = logits_of(layout, chunks)
    with adapters_disabled(chunks):
        off = logits_of(layout, chunks)
        with torch.no_grad():
            for linear in iter_adapters(chunks):
                linear.weight.add_(linear.lora_update())
        by_hand = logits_of(layout, chunks)
    assert not torch.allclose(on, off)
    return adapted.relative(on - by_hand, by_hand)


def export(layout: Layout, hf_dir, config, values, out, moe_format):
    from slime_plugins.lora import export_peft

    chunks = chunks_of(layout, hf_dir, True, config, values)
    export_peft(chunks, out, hf_checkpoint=hf_dir, moe_format=moe_format)


def imported(layout: Layout, hf_dir, adapter_dir, values):
    """Largest difference of this rank's adapters, after an import, from the values they came from."""
    from slime_plugins.lora import LoRAConfig, import_peft

    config = LoRAConfig.from_peft(adapter_dir)
    chunks = chunks_of(layout, hf_dir, True, config)
    import_peft(chunks, adapter_dir)
    worst = 0.0
    for linear in iter_linears(chunks):
        As, Bs = adapted.shard(linear, values)
        for i, (A, B) in enumerate(zip(As, Bs)):
            part_A, part_B = parts_of(linear, linear.lora_A, linear.lora_B, i)
            worst = max(worst, (part_A - A).abs().max().item(), (part_B - B).abs().max().item())
    return worst


def parts_of(linear, A, B, index: int):
    """One projection's rows of A and B, in Hugging Face order, found from the row numbers of the base weight."""
    start = index * linear.lora.rank if linear.lora.split else 0
    return A[start : start + linear.lora.rank], B[adapted.rows_of_B(linear, index)]


def save_trained(layout: Layout, hf_dir, config, values, path):
    """Two steps of Adam, a checkpoint; weights and state as ``shards_of``."""
    from slime_plugins.lora import save_adapter

    model, optimizer = _adam(layout, hf_dir, config)
    adapted.set_values(model, values)
    optimizer.reload_model_params()
    for _ in range(2):
        adapted.train_step(model, optimizer, TOKENS, microbatches=layout.pp)
    save_adapter(model, path, optimizer=optimizer, step=2)
    return shards_of(model, adam_states(optimizer))


def load_and_save(layout: Layout, hf_dir, config, source, target):
    from slime_plugins.lora import load_adapter, save_adapter

    model, optimizer = _adam(layout, hf_dir, config)
    load_adapter(model, source, optimizer=optimizer)
    save_adapter(model, target, optimizer=optimizer, step=2)
    return shards_of(model, adam_states(optimizer))


def _adam(layout, hf_dir, config):
    model = adapted.wrap(chunks_of(layout, hf_dir, True, config), distributed_optimizer=False)
    return model, adapted.optimizer_for(model, lr=1e-2, distributed_optimizer=False)


def adam_states(optimizer) -> dict:
    """Parameter -> its moments, over the optimizers of dense parameters and of experts."""
    states = {}
    for one in optimizer.chained_optimizers:
        states |= one.optimizer.state if one.optimizer is not None else {}
    return states


def shards_of(model, states: dict | None = None) -> dict:
    """This rank's A and B of every projection, and with ``states`` their moments, for ``whole`` to put together.

    (linear, projection, which) -> (shard, rank in the tensor-parallel group, sharded dimension or None)
    """
    found = {}
    for linear in iter_linears(model):
        spec, tp_rank = linear.lora, linear.lora_tp_group.rank()
        owner, at = linear.owner, linear.index
        A_dim, B_dim = {"row": (1, None), "column": (None, 0)}.get(spec.parallel, (None, None))
        for name in ("value", "exp_avg", "exp_avg_sq") if states is not None else ("value",):
            A, B = ((p.detach() if name == "value" else states[p][name])[at] for p in (owner.lora_A, owner.lora_B))
            for i, part in enumerate(spec.parts):
                part_A, part_B = parts_of(linear, A, B, i)
                found[spec.name, part.name, f"A {name}"] = part_A.clone(), tp_rank, A_dim
                found[spec.name, part.name, f"B {name}"] = part_B.clone(), tp_rank, B_dim
    return found
