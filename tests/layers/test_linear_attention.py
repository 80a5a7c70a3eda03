"""Linear attention (Qwen3.5, Qwen3-Next): logits and gradients against transformers + PEFT, however it is split.

Its projections are whole on every tensor-parallel rank, in slime and here (tests/support/linear_attention.py).

    pytest tests/layers/test_linear_attention.py
"""

from __future__ import annotations

import moe_models
import moe_runs
import pytest
from harness import WorkerError
from moe_runs import ALPHA, RANK
from test_experts import check, references  # noqa: F401 - a fixture

from slime_plugins.lora import LoRAConfig

DENSE = {"tp1": {}, "tp2": dict(tp=2), "tp2-sp": dict(tp=2, sp=True), "pp2": dict(pp=2)}
EXPERTS = {"tp1": {}, "tp2-sp": dict(tp=2, sp=True, etp=1), "pp2": dict(pp=2), "ep2": dict(ep=2, etp=1)}


@pytest.mark.parametrize("split", DENSE)
def test_dense(te_pool4, references, split):  # noqa: F811
    classes = check(te_pool4, references, "qwen3_5_text", **DENSE[split])
    assert "LoRAPlainLinear" in classes


@pytest.mark.parametrize("split", EXPERTS)
@pytest.mark.parametrize("family", ["qwen3_5_moe_text", "qwen3_next"])
def test_with_experts(te_pool4, references, family, split):  # noqa: F811
    classes = check(te_pool4, references, family, **EXPERTS[split])
    assert "LoRAPlainLinear" in classes


def test_recompute(te_pool4, references):  # noqa: F811
    full = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    check(te_pool4, references, "qwen3_5_text", overrides=full, tp=2, sp=True)


def test_twenty_steps_leave_replicas_equal(te_pool4, references):  # noqa: F811
    """No rank sees more than another: A and B stay equal bit for bit, and end where one process ends.

    Linear attention amplifies rounding: 7e-8 of its in_proj_qkv after one step is 4e-6 after twenty, at one
    tensor-parallel size, between two orders of the same products elsewhere (``--lora-linears fused`` and ``taps``).
    """
    path, values, _, _ = references("qwen3_5_text")
    config = LoRAConfig(rank=RANK, alpha=ALPHA, layout="split")

    def ends(**sizes):
        return moe_runs.whole(te_pool4.run(moe_runs.train, path, True, config, values, 20, **sizes))

    expected = ends()
    for sizes in (dict(tp=2), dict(tp=2, sp=True)):
        for key, value in ends(**sizes).items():
            assert (value - expected[key]).abs().max() <= 1e-5 * expected[key].abs().max(), key


def test_off_and_merged(te_pool4, references):  # noqa: F811
    path, values, _, _ = references("qwen3_next")
    config = LoRAConfig(rank=RANK, alpha=ALPHA, layout="split")
    for off, merged, restored in te_pool4.run(
        moe_runs.switched_off_and_merged, path, True, config, values, **EXPERTS["tp2-sp"]
    ):
        assert off and restored and merged <= 1e-5


def test_targets(te_pool4, references):  # noqa: F811
    """all-linear leaves the gates of one row per head alone; a name adapts them."""
    path = references("qwen3_5_text")[0]
    parts = ("in_proj_qkv", "in_proj_z", "out_proj")
    for targets, expected in (
        (("all-linear",), {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", *parts}),
        (("linear_attn.out_proj", "in_proj_z"), {"out_proj", "in_proj_z"}),
        (("in_proj_a", "in_proj_b"), {"in_proj_a", "in_proj_b"}),
    ):
        config = LoRAConfig(rank=RANK, alpha=ALPHA, target_modules=targets)
        for modules, report in te_pool4.run(moe_runs.adapted_paths, path, config, tp=2, sp=True):
            assert {module.rsplit(".", 1)[1] for module in modules} == expected
            shapes = moe_models.linears(path)
            if targets == ("all-linear",):
                one_A = {"k_proj", "v_proj", "up_proj"}  # share q's and gate's
                count = sum(o + (0 if n.rsplit(".", 1)[1] in one_A else i) for n, (o, i) in shapes.items())
                assert report.trainable_parameters == RANK * count
                assert report.total_parameters == RANK * count + moe_models.num_parameters(path)


def test_context_parallelism_is_refused(te_pool4, references):  # noqa: F811
    path = references("qwen3_5_text")[0]
    config = LoRAConfig(rank=RANK, alpha=ALPHA, target_modules=("linear_qkv",))
    with pytest.raises(WorkerError, match=r"over context parallelism drops the gradients that cross chunks"):
        te_pool4.run(moe_runs.adapted_paths, path, config, cp=2)
