"""A 4-bit base with experts and latent attention: every projection of every expert has bitsandbytes' bits.

pytest tests/quant/test_nf4_experts.py
"""

from __future__ import annotations

import moe_models
import moe_reference
import moe_runs
import nf4_oracle
import nf4_runs
import pytest

from slime_plugins.lora import LoRAConfig


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """family -> (checkpoint, adapter values, logits, gradients, weights), of transformers + PEFT on what codes say."""
    cache = {}

    def get(family):
        if family not in cache:
            with moe_models.sizes(**nf4_oracle.MOE_SIZES):
                unused = (4, 5, 6, 7) if family == "glm4_moe" else ()
                path = moe_models.make_checkpoint(tmp_path_factory.mktemp(family), family, unused_experts=unused)
                weights = nf4_oracle.through_codes(path, moe_models.linears(path))
                dense = nf4_oracle.dense_copy(path, weights, tmp_path_factory.mktemp("dense") / family)
                values = moe_reference.values_of(path, moe_runs.RANK, "split")
                adapter = moe_reference.write_adapter(
                    dense / "adapter", dense, values, rank=moe_runs.RANK, alpha=moe_runs.ALPHA
                )
                model = moe_reference.peft_model(dense, adapter)
                logits, grads = moe_reference.logits_and_grads(model, moe_runs.TOKENS, moe_runs.RANK)
            cache[family] = path, values, logits, grads, weights
        return cache[family]

    return get


@pytest.mark.parametrize(
    "family, te, split",
    [
        ("deepseek_v3", True, "tp2-ep2-etp2"),
        pytest.param("qwen3_moe", False, "tp2-ep2-etp2", marks=pytest.mark.slow),
        pytest.param("glm4_moe", False, "ep2", marks=pytest.mark.slow, id="experts-without-tokens"),
        pytest.param("glm4_moe", True, "ep2", marks=pytest.mark.slow, id="te-experts-without-tokens"),
        pytest.param("qwen3_moe", True, "ep4", marks=pytest.mark.slow),
        pytest.param("qwen3_next", True, "tp2-etp1", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", True, "pp2-ep2", marks=pytest.mark.slow),
    ],
)
def test_parity(request, references, family, te, split):
    path, values, logits, grads, weights = references(family)
    config = LoRAConfig(rank=moe_runs.RANK, alpha=moe_runs.ALPHA, layout="split")
    pool = request.getfixturevalue("te_pool4" if te else "pool4")
    run = path, te, config, values, logits, grads, weights
    results = pool.run(nf4_runs.moe_parity, *run, **moe_runs.SPLITS[split])
    assert set().union(*(r["weights"] for r in results)) == set(weights)
    assert any("logits" in r for r in results)
    for r in results:
        assert r["differ"] == []
        assert r.get("logits", 0) <= 1e-5
        assert r["A"] <= 1e-4 and r["B"] <= 1e-4
    classes = set().union(*(r["classes"] for r in results))
    assert ("LoRATEColumnParallelGroupedLinear" if te else "LoRAExpertColumnLinears") in classes
