"""Models with routed experts: logits and adapter gradients against transformers + PEFT, fp32, however they are split.

Megatron's local linears in a SequentialMLP, and its grouped TransformerEngine classes over tests/te_stub.

    pytest tests/layers/test_experts.py
"""

from __future__ import annotations

import moe_models
import moe_reference
import moe_runs
import pytest
import torch
from harness import WorkerError
from moe_runs import ALPHA, RANK, SPLITS, TOKENS

from slime_plugins.lora import LoRAConfig


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """family, layout, rank, unused experts -> (directory, values, logits, gradients), computed once."""
    cache = {}

    def get(family, layout="split", rank=RANK, unused=()):
        key = family, layout, rank, unused
        if key not in cache:
            path = moe_models.make_checkpoint(tmp_path_factory.mktemp(family), family, unused_experts=unused)
            values = moe_reference.values_of(path, rank, layout)
            adapter = moe_reference.write_adapter(path / "adapter", path, values, rank=rank, alpha=ALPHA)
            model = moe_reference.peft_model(path, adapter)
            cache[key] = path, values, *moe_reference.logits_and_grads(model, TOKENS, rank)
        return cache[key]

    return get


def check(
    pool,
    references,
    family,
    *,
    run=moe_runs.parity,
    te=True,
    layout="split",
    rank=RANK,
    unused=(),
    overrides=None,
    **sizes,
):
    path, values, logits, grads = references(family, layout, rank, unused)
    config = LoRAConfig(rank=rank, alpha=ALPHA, layout=layout)
    results = pool.run(run, path, te, config, values, logits, grads, overrides or {}, **sizes)
    assert any("logits" in r for r in results)
    for r in results:
        assert r.get("logits", 0) <= 1e-5
        assert r["A"] <= 1e-4 and r["B"] <= 1e-4
        if layout == "split":  # then every A of ours has one of PEFT's
            norm = torch.stack([g.double().norm() for pair in grads.values() for g in pair]).norm().item()
            assert r["grad_norm"] == pytest.approx(norm, rel=1e-5), "each replica counts once in the norm"
    return set().union(*(r["classes"] for r in results))


@pytest.mark.parametrize("split", SPLITS)
def test_grouped(te_pool4, references, split):
    assert "LoRATEColumnParallelGroupedLinear" in check(te_pool4, references, "qwen3_moe", **SPLITS[split])


def test_single_weight(te_pool4, references):
    """TE's variant with one weight for all experts of a rank."""
    check(te_pool4, references, "qwen3_moe", run=moe_runs.parity_of_single_weights, **SPLITS["tp2-ep2-etp2"])


@pytest.mark.parametrize("split", ["ep2", "tp2-etp1", "tp2-ep2-etp2"])
def test_sequential(pool4, references, split):
    """One A for gate and up, in a list of small MLPs."""
    classes = check(pool4, references, "qwen3_moe", te=False, layout="fused", **SPLITS[split])
    assert {"LoRAExpertColumnLinears", "LoRAExpertRowLinears"} <= classes


def test_sequential_of_te(te_pool4, references):
    """TE's dense linears as experts: without a parallel mode, whatever the size of the group."""
    overrides = dict(moe_grouped_gemm=False)
    check(te_pool4, references, "qwen3_moe", overrides=overrides, **SPLITS["tp2-ep2-etp2"])


@pytest.mark.parametrize("split", ["ep2", "tp2-etp1", "tp2-ep2-etp2", "pp2-ep2"])
def test_latent_attention(te_pool4, references, split):
    """DeepSeek-V3: duplicated down projections, norms fused into the up projections, a dense layer, shared experts."""
    classes = check(te_pool4, references, "deepseek_v3", **SPLITS[split])
    assert {"LoRATELinear", "LoRATELayerNormColumnParallelLinear"} <= classes


def test_latent_attention_of_own_linears(te_pool4, references):
    """At TP 1: with more, Megatron's own backward through its local kv down projection is wrong."""
    check(te_pool4, references, "deepseek_v3", te=False, layout="fused", **SPLITS["ep2"])


@pytest.mark.parametrize("layout", ["fused", "split"])
@pytest.mark.parametrize("split", ["ep2", "tp2-ep2-etp2"])
def test_gated_attention(te_pool4, references, split, layout):
    """Qwen3-Next's q_proj holds a gate per head, which lies elsewhere in Megatron's linear_qkv."""
    check(te_pool4, references, "qwen3_next", layout=layout, **SPLITS[split])


@pytest.mark.parametrize("te, sp", [(False, True), (True, False)])
def test_latent_attention_where_megatron_is_wrong(te_pool4, references, te, sp):
    """Whatever is adapted: gradients of every layer below would be wrong, and another's on every rank."""
    path = references("deepseek_v3")[0]
    config = LoRAConfig(rank=RANK, alpha=ALPHA, target_modules=("linear_proj",))
    with pytest.raises(WorkerError, match=r"multi-latent attention are wrong .* at tensor-parallel size 2; use"):
        te_pool4.run(moe_runs.chunks_of, path, te, config, tp=2, sp=sp, etp=1)


@pytest.mark.parametrize("te", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next", "qwen3_5_moe_text"])
def test_experts_that_megatron_does_not_train(te_pool4, references, family, te):
    """Whatever is adapted, at injection; without that Megatron itself stops, at the first step."""
    path = references(family)[0]
    config = LoRAConfig(rank=RANK, alpha=ALPHA, target_modules=("linear_proj",))
    with pytest.raises(WorkerError, match=r"trains no experts at tensor-parallel size 2 .*; add --sequence-parallel"):
        te_pool4.run(moe_runs.chunks_of, path, te, config, tp=2, etp=1)
    if te and family == "qwen3_moe":
        with pytest.raises(WorkerError, match=r"During training, .* without also enabling sequence parallelism"):
            te_pool4.run(moe_runs.base_step, path, tp=2, etp=1)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("te", [False, True])
def test_shared_experts(te_pool4, references, te, overlap):
    """With overlap Megatron takes the exchange out of these linears (design hazard 14): no number may change."""
    overrides = dict(moe_shared_expert_overlap=overlap)
    check(te_pool4, references, "qwen2_moe", te=te, overrides=overrides, **SPLITS["tp2-ep2-etp1"])


@pytest.mark.parametrize("te", [False, True])
@pytest.mark.parametrize("split", ["ep2", "tp2-ep2-etp2"])
def test_experts_without_tokens(te_pool4, references, split, te):
    """Half of the experts get none: at EP 2 a whole rank has nothing to do, and must not hang or spoil a gradient."""
    unused = (4, 5, 6, 7)
    grads = references("glm4_moe", unused=unused)[3]
    assert not grads["model.layers.1.mlp.experts.6.up_proj"][1].any()
    assert grads["model.layers.1.mlp.experts.1.up_proj"][1].any()
    check(te_pool4, references, "glm4_moe", te=te, unused=unused, **SPLITS[split])


def test_odd_rank(te_pool4, references):
    """A rank that torch's grouped product does not take goes through padded experts."""
    check(te_pool4, references, "qwen3_moe", rank=3, **SPLITS["tp2-ep2-etp2"])


@pytest.mark.parametrize("recompute", ["moe_act", "moe", "full"])
def test_recompute(te_pool4, references, recompute):
    selective = dict(recompute_granularity="selective", recompute_modules=[recompute])
    full = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    overrides = full if recompute == "full" else selective
    check(te_pool4, references, "qwen3_moe", overrides=overrides, **SPLITS["tp2-ep2-etp2"])


@pytest.fixture(scope="module")
def twenty_steps(te_pool4, references):
    """Trains by SGD at a split, and gives what has become of the adapters."""
    path, values, _, _ = references("qwen3_moe")
    config = LoRAConfig(rank=RANK, alpha=ALPHA, layout="split")

    def ends(**sizes):
        return moe_runs.whole(te_pool4.run(moe_runs.train, path, True, config, values, 20, **sizes))

    expected = ends()
    assert len(expected) == 2 * len(values)
    return ends, expected


@pytest.mark.parametrize(
    "split",
    ["ep2", "tp2-ep2-etp2", *(pytest.param(split, marks=pytest.mark.slow) for split in ("tp2-ep2-etp1", "tp1-etp2"))],
)
def test_twenty_steps_agree(twenty_steps, split):
    """SGD at every split ends where it ends at EP 1; replicas stay equal bit for bit."""
    ends, expected = twenty_steps
    seen = ends(**SPLITS[split])
    assert seen.keys() == expected.keys()
    for key, value in expected.items():
        assert (seen[key] - value).abs().max() <= 1e-6 * value.abs().max(), f"{split}: {key}"


def test_buffers_and_groups(te_pool4, references):
    """Experts reduce over their own data-parallel group wherever that is not the dense one."""
    path = references("qwen3_moe")[0]
    config = LoRAConfig(rank=RANK, alpha=ALPHA)
    for split, own_group in (("dp4", False), ("tp2-etp2", False), ("ep2", True), ("tp2-etp1", True)):
        for expert, dense, start in te_pool4.run(moe_runs.groups, path, config, **SPLITS[split]):
            assert (expert == {False}) is own_group and dense == {True}, split
            assert start, "A of an expert depends on its number alone"


def test_adapters_off_and_merged(te_pool4, references):
    path, values, _, _ = references("qwen3_moe")
    config = LoRAConfig(rank=RANK, alpha=ALPHA, layout="split")
    for te in (False, True):
        for off, merged, restored in te_pool4.run(
            moe_runs.switched_off_and_merged, path, te, config, values, **SPLITS["tp2-ep2-etp2"]
        ):
            assert off and restored
            assert merged <= 1e-5


TARGETS = {
    ("experts.linear_fc1",): {"mlp.experts.linear_fc1"},
    ("experts.down_proj",): {"mlp.experts.linear_fc2"},
    ("shared_experts.linear_fc1",): {"mlp.shared_experts.linear_fc1"},
    ("mlp.linear_fc2", "q_a_proj"): {"mlp.linear_fc2", "self_attention.linear_q_down_proj"},
    ("router",): {"mlp.router"},
    ("*.layers.1.*.gate_proj",): {"mlp.experts.linear_fc1", "mlp.shared_experts.linear_fc1"},
}


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_targets(te_pool4, references, targets):
    """Experts, shared experts, dense MLPs and the router are named apart."""
    path = references("deepseek_v3")[0]
    config = LoRAConfig(rank=RANK, alpha=ALPHA, target_modules=targets)
    for modules, _ in te_pool4.run(moe_runs.adapted_paths, path, config, ep=2, etp=1):
        assert set(modules) == TARGETS[targets]


def test_report(te_pool4, references):
    """Counts do not depend on the split, the router is left alone, and what cannot be adapted is said."""
    path, values, _, _ = references("deepseek_v3")
    config = LoRAConfig(rank=RANK, alpha=ALPHA, layout="split")
    trainable = sum(A.numel() + B.numel() for A, B in values.values())
    for split in ("dp4", "ep2", "tp2-ep2-etp2", "pp2-ep2"):
        for modules, report in te_pool4.run(moe_runs.adapted_paths, path, config, **SPLITS[split]):
            assert "mlp.router" not in modules
            assert report.trainable_parameters == trainable
            assert report.total_parameters == trainable + moe_models.num_parameters(path)
            assert report.not_adaptable == ()
    unknown = te_pool4.run(moe_runs.with_unknown_linear, path, config, pp=2)
    for report in unknown:
        (line,) = report.not_adaptable
        assert "mlp.fc1_latent_proj" in line and line in str(report)


def test_router_by_name(te_pool4, references):
    """Its logits get the low-rank term, before the top-k."""
    path = references("qwen3_moe")[0]
    config = LoRAConfig(rank=RANK, alpha=ALPHA, target_modules=("router",))
    for error in te_pool4.run(moe_runs.router, path, config, **SPLITS["tp2-etp1"]):
        assert error <= 1e-5


def test_dropout_where_masks_cannot_agree(te_pool4, references):
    path = references("qwen3_moe")[0]
    config = LoRAConfig(rank=RANK, alpha=ALPHA, dropout=0.1)
    with pytest.raises(WorkerError, match=r"dropout on .*experts.* with expert tensor parallelism"):
        te_pool4.run(moe_runs.adapted_paths, path, config, **SPLITS["tp2-etp2"])
    te_pool4.run(moe_runs.adapted_paths, path, config, **SPLITS["ep2"])
