"""Activations as ``cost.activations`` has them, against the bytes that autograd saves in Megatron's own layers.

Storages counted once, parameters not: tests/support/saved_bytes.py. Run: pytest tests/cost/test_activations.py
"""

from __future__ import annotations

from functools import partial

import adapted
import moe_models
import moe_runs
import pytest
import saved_bytes
import torch
from harness import Layout
from tiny_checkpoints import tiny

from slime_plugins.lora import LoRAConfig, apply_lora
from slime_plugins.lora.cost.activations import Batch, Kernels, stage_activations
from slime_plugins.lora.cost.memory import Trained
from slime_plugins.lora.cost.model import Model, Split
from slime_plugins.lora.rehearsal.model import build_chunks

TOKENS = 48
CONFIG = LoRAConfig(rank=4)
ATTENTION = LoRAConfig(rank=3, layout="split", target_modules=("q_proj", "v_proj", "o_proj"))
METHODS = {"full": Trained(base=True), "lora": Trained(lora=CONFIG), "attention": Trained(lora=ATTENTION)}


def dense_bytes(layout: Layout, hf_dir, trained: Trained, recompute: str, flash: bool) -> int:
    """One rank: bytes saved by the forward of one microbatch."""
    apply = partial(apply_lora, config=trained.lora) if trained.lora else None
    chunks = build_chunks(
        hf_dir,
        sequence_parallel=layout.sp,
        recompute=None if recompute == "none" else recompute,
        layer_spec=saved_bytes.flash_spec if flash else None,
        apply=apply,
    )
    model = adapted.wrap(chunks)
    with saved_bytes.saving(chunks) as saved:
        adapted.run_schedule(model, torch.randint(4, 120, (1, TOKENS + 1)))
    return saved.bytes


def reckoned(path, trained: Trained, sizes: dict, recompute: str, flash: bool) -> list[int]:
    """The same of each stage; what the loss keeps included."""
    split = Split(**{"sp": False, **sizes})
    stages = stage_activations(
        Model.read(path),
        trained,
        split,
        Batch(tokens=TOKENS),
        recompute=recompute,
        dtype="float32",
        kernels=Kernels(flash=flash, te=False, fused=False),
    )
    return [stage.kept + stage.logits for stage in stages]


CASES = [
    ("qwen3", {}, "lora", "none", False),
    ("qwen3", {}, "full", "none", False),
    ("qwen3", dict(tp=2, sp=True), "lora", "none", True),
    ("qwen3", dict(tp=2), "full", "none", True),
    ("qwen3", dict(tp=2, sp=True), "lora", "full", False),
    ("qwen3", dict(tp=2, sp=True), "attention", "selective", False),
    ("llama", dict(pp=2), "attention", "none", True),
    ("llama", dict(pp=2), "full", "selective", False),
    ("qwen2", dict(tp=2, sp=True), "full", "full", True),
    ("qwen2", {}, "lora", "selective", True),
]


@pytest.mark.parametrize("family, sizes, method, recompute, flash", CASES)
def test_dense(request, tmp_path_factory, family, sizes, method, recompute, flash):
    path = tiny(tmp_path_factory, family)
    pool = request.getfixturevalue("pool2" if sizes else "pool1")
    ranks = pool.run(dense_bytes, path, METHODS[method], recompute, flash, **sizes)
    stages = reckoned(path, METHODS[method], sizes, recompute, flash)
    if "pp" not in sizes:
        stages = stages * len(ranks)
    for seen, expected in zip(ranks, stages, strict=True):
        assert expected == pytest.approx(seen, rel=0.1), (ranks, stages)


def moe_bytes(layout: Layout, hf_dir, trained: Trained) -> int:
    chunks = moe_runs.chunks_of(layout, hf_dir, False, trained.lora)
    model = adapted.wrap(chunks)
    tokens = torch.randint(4, 90, (torch.distributed.get_world_size(), TOKENS + 1))
    with saved_bytes.saving(chunks) as saved:
        adapted.run_schedule(model, tokens)
    return saved.bytes


@pytest.mark.parametrize(
    "family, sizes, method",
    [
        ("qwen3_moe", dict(ep=2, etp=1), "lora"),
        ("qwen2_moe", dict(tp=2, sp=True, ep=2, etp=2), "full"),
        ("glm4_moe", dict(pp=2, ep=2, etp=1), "lora"),
    ],
)
def test_experts(pool4, tmp_path, family, sizes, method):
    """A router spreads tokens as it likes; all ranks of a stage together have as many rows as is reckoned."""
    path = moe_models.make_checkpoint(tmp_path, family)
    ranks = pool4.run(moe_bytes, path, METHODS[method], **sizes)
    pp = sizes.get("pp", 1)
    split = Split(dp=4 // sizes.get("tp", 1) // pp, **sizes)
    stages = stage_activations(
        Model.read(path),
        METHODS[method],
        split,
        Batch(tokens=TOKENS * 4 // split.dp),
        recompute="none",
        dtype="float32",
        kernels=Kernels(flash=True, te=False, fused=False),
    )
    for number, stage in enumerate(stages):
        seen = ranks[number * 4 // pp : (number + 1) * 4 // pp]
        assert stage.kept + stage.logits == pytest.approx(sum(seen) / len(seen), rel=0.1), (ranks, stages)


def te_bytes(layout: Layout, hf_dir, trained: Trained, family: str) -> int:
    """As ``dense_bytes`` and ``moe_bytes``, on TransformerEngine's linears (the stand-in) and attention of torch."""
    if family == "deepseek_v3":
        chunks = moe_runs.chunks_of(layout, hf_dir, True, trained.lora)
        samples = torch.distributed.get_world_size() // layout.tp
    else:
        import te_models

        def layer_spec(base, config):
            layer = te_models.te_layer_spec(base, config)
            layer.submodules.self_attention.submodules.core_attention = moe_models.Attention
            return layer

        apply = partial(apply_lora, config=trained.lora) if trained.lora else None
        chunks = build_chunks(hf_dir, sequence_parallel=layout.sp, layer_spec=layer_spec, apply=apply)
        samples = 1
    model = adapted.wrap(chunks)
    with saved_bytes.saving(chunks) as saved:
        adapted.run_schedule(model, torch.randint(4, 90, (samples, TOKENS + 1)))
    return saved.bytes


@pytest.mark.parametrize(
    "family, sizes, method",
    [
        ("qwen2", dict(tp=2, sp=True), "full"),
        ("qwen2", dict(tp=2, sp=True), "attention"),
        ("deepseek_v3", dict(tp=2, sp=True, ep=2, etp=2), "lora"),
    ],
)
def test_transformer_engine(request, tmp_path, tmp_path_factory, family, sizes, method):
    """Frozen linears of TransformerEngine keep no input, fused with their norm or not. Latent attention."""
    latent = family == "deepseek_v3"
    pool = request.getfixturevalue("te_pool4" if latent else "te_pool2")
    path = moe_models.make_checkpoint(tmp_path, family) if latent else tiny(tmp_path_factory, family)
    ranks = pool.run(te_bytes, path, METHODS[method], family, **sizes)
    kernels = Kernels(flash=not latent, te=True, fused=False)  # on a CPU, heads of two sizes have no flash attention
    split = Split(dp=len(ranks) // 2, **sizes)
    how = dict(recompute="none", dtype="float32", kernels=kernels)
    [stage] = stage_activations(Model.read(path), METHODS[method], split, Batch(tokens=TOKENS), **how)
    assert stage.kept + stage.logits == pytest.approx(sum(ranks) / len(ranks), rel=0.1), ranks
