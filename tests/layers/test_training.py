"""Twenty steps of real training: tensor-parallel sizes agree, replicas stay bit-identical, the base stays frozen.

pytest tests/layers/test_training.py
"""

from __future__ import annotations

import hashlib

import adapted
import pytest
import reference
import torch
import torch.distributed as dist
from harness import Layout
from tiny_checkpoints import tiny

from slime_plugins.lora import LoRAConfig
from slime_plugins.lora.adapters import iter_adapters
from slime_plugins.lora.ends.export import gather_projections

STEPS = 20
CONFIG = LoRAConfig(rank=4, alpha=8)


def checksum(tensors) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def base_checksum(model) -> str:
    named = (
        (f"{i}.{name.removeprefix('module.')}", p) for i, c in enumerate(model) for name, p in c.named_parameters()
    )
    return checksum(pair for pair in named if "lora_" not in pair[0])


def replicas_equal(model) -> bool:
    """Are the halves that every tensor-parallel rank holds whole the same bits everywhere?"""
    same = True
    for linear in iter_adapters(model):
        mine = linear.lora_A if linear.lora.parallel == "column" else linear.lora_B
        group = linear.tp_group
        others = [torch.empty_like(mine) for _ in range(group.size())]
        dist.all_gather(others, mine.detach().contiguous(), group=group)
        same = same and all(torch.equal(mine, other) for other in others)
    return same


def train(layout: Layout, hf_dir, config, optimizer_name, lr, steps=STEPS, recompute=None, microbatches=1, clip=1.0):
    """Train on a fixed stream of batches. Returns losses, grad norms, whole adapters, and two verdicts."""
    chunks = adapted.adapted_chunks(hf_dir, config, sp=layout.sp, vpp=layout.vpp, recompute=recompute)
    before = base_checksum(chunks)
    distributed = optimizer_name == "adam"  # Megatron's distributed optimizer knows Adam alone
    model = adapted.wrap(chunks, distributed_optimizer=distributed)
    optimizer = adapted.optimizer_for(
        model, lr=lr, name=optimizer_name, clip_grad=clip, distributed_optimizer=distributed
    )
    losses, norms, replicated = [], [], replicas_equal(model)
    for step in range(steps):
        tokens = torch.randint(4, 128, (4, 17), generator=torch.Generator().manual_seed(step))
        loss, norm = adapted.train_step(model, optimizer, tokens, microbatches=microbatches)
        losses.append(None if loss is None else loss.item())
        norms.append(norm)
        replicated = replicated and replicas_equal(model)
    projections = gather_projections(model)
    adapters = None
    if projections is not None:
        adapters = {f"{p.name}.{half}": getattr(p, half) for p in projections for half in "AB"}
    return losses, norms, adapters, replicated, before == base_checksum(model)


@pytest.fixture(scope="module")
def one_process(pool1, tmp_path_factory):
    """optimizer -> the run at tensor-parallel size 1."""
    path = tiny(tmp_path_factory)
    return path, {name: pool1.run(train, path, CONFIG, name, lr)[0] for name, lr in LRS.items()}


LRS = {"sgd": 0.1, "adam": 1e-3}
# Adam divides by the root of the second moment, which amplifies rounding where gradients are near zero.
TOLERANCES = {"sgd": 1e-6, "adam": 1e-4}


@pytest.mark.parametrize("name", ["sgd", "adam"])
@pytest.mark.parametrize("sp", [False, True])
def test_tensor_parallel_sizes_agree(pool2, one_process, name, sp):
    """Hazards 3 and 4: gradients of replicas are summed once, counted once, and copies never drift."""
    path, runs = one_process
    losses, norms, adapters, _, _ = runs[name]
    assert losses[-1] != losses[0] and min(norms) > 1e-3  # it did train
    results = pool2.run(train, path, CONFIG, name, LRS[name], tp=2, sp=sp)
    for other_losses, other_norms, other, replicated, frozen in results:
        assert replicated and frozen
        assert other_norms == pytest.approx(norms, rel=1e-6)
        assert other_losses == pytest.approx(losses, rel=1e-5)
        largest = max(tensor.abs().max() for tensor in adapters.values())
        assert adapters.keys() == other.keys()
        for key, tensor in adapters.items():
            assert (other[key] - tensor).abs().max() <= TOLERANCES[name] * largest, key


def test_recompute_trains_the_same(pool1, one_process):
    """Hazard 5, over optimizer steps: full recompute gives the run without it, bit for bit."""
    path, runs = one_process
    losses, norms, adapters, _, frozen = pool1.run(train, path, CONFIG, "sgd", LRS["sgd"], STEPS, "full")[0]
    assert frozen and losses == runs["sgd"][0] and norms == runs["sgd"][1]
    assert all(torch.equal(tensor, runs["sgd"][2][key]) for key, tensor in adapters.items())


@pytest.mark.parametrize("sizes", [{"pp": 2}, {"pp": 2, "vpp": 2}, {}], ids=["pp2", "pp2-vpp2", "dp2"])
def test_pipeline_and_data_parallel_agree(pool2, one_process, sizes):
    """Hazard 7 too: embeddings are tied, the base frozen, and finalize_model_grads looks for their gradient."""
    path, runs = one_process
    microbatches = 2 if sizes else 1
    results = pool2.run(train, path, CONFIG, "sgd", LRS["sgd"], STEPS, None, microbatches, **sizes)
    whole = [adapters for _, _, adapters, _, _ in results if adapters is not None]
    assert whole and all(frozen for *_, frozen in results)
    expected = runs["sgd"][2]
    largest = max(tensor.abs().max() for tensor in expected.values())
    for adapters in whole:
        assert adapters.keys() == expected.keys()
        assert all((adapters[key] - tensor).abs().max() <= 1e-6 * largest for key, tensor in expected.items())
    for _, norms, *_ in results:
        assert norms == pytest.approx(runs["sgd"][1], rel=1e-6)


def test_a_stage_without_adapters_trains(pool2, tmp_path_factory):
    """Targets in the first layer alone: the second stage has nothing to optimize, and must neither fail nor hang."""
    config = LoRAConfig(rank=2, target_modules=("*.layers.0.*",))
    results = pool2.run(train, tiny(tmp_path_factory), config, "adam", 1e-2, 3, None, 2, pp=2)
    adapters = next(adapters for _, _, adapters, _, _ in results if adapters is not None)
    assert len(adapters) == 2 * len(reference.LEAVES)
    assert all(tensor.abs().max() > 0 for tensor in adapters.values())
    assert all(norm > 0 for _, norms, *_ in results for norm in norms)


def test_four_steps_of_bf16(pool2, tmp_path_factory):
    """bf16 base and adapters with fp32 masters: replicas stay bit-identical through the distributed optimizer."""
    for losses, replicated, frozen in pool2.run(train_bf16, tiny(tmp_path_factory), tp=2, sp=True):
        assert replicated and frozen and losses[-1] < losses[0]


def train_bf16(layout: Layout, hf_dir):
    chunks = adapted.adapted_chunks(hf_dir, CONFIG, sp=layout.sp, dtype=torch.bfloat16)
    before, model = base_checksum(chunks), adapted.wrap(chunks)
    optimizer = adapted.optimizer_for(model, lr=2e-2, bf16=True, clip_grad=1.0)
    tokens = reference.batch(128)
    losses = [adapted.train_step(model, optimizer, tokens)[0].item() for _ in range(4)]
    return losses, replicas_equal(model), before == base_checksum(model)
