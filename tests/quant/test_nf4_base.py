"""A 4-bit base against transformers + bitsandbytes + PEFT in one process, and against the dense base of its weights.

pytest tests/quant/test_nf4_base.py
"""

from __future__ import annotations

import nf4_oracle
import nf4_runs
import pytest
import reference
import torch

from slime_plugins.lora import BaseQuant

TOKENS = reference.batch(128)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """(checkpoint, dequantised weights, logits, gradients) of the fp32 model, nested scales."""
    path = nf4_oracle.checkpoint(tmp_path_factory)
    model = nf4_oracle.peft_model(path)
    logits, _, grads = reference.logits_loss_grads(model, TOKENS)
    return path, nf4_oracle.dequantised(model), logits, grads


@pytest.mark.parametrize("sizes", [dict(), dict(tp=2), dict(pp=2)], ids=str)
def test_weights_are_those_of_bitsandbytes(pool1, pool2, oracle, sizes):
    path, expected, *_ = oracle
    found = {}
    for rank in (pool2 if sizes else pool1).run(nf4_runs.weights, path, **sizes):
        found |= rank
    assert len(expected) == 14 and found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "plain"])
def test_bf16_weights(pool2, tmp_path_factory, double_quant):
    path = nf4_oracle.checkpoint(tmp_path_factory, dtype=torch.bfloat16)
    expected = nf4_oracle.dequantised(nf4_oracle.peft_model(path, torch.bfloat16, double_quant))
    quant = BaseQuant(double_quant=double_quant)
    found, _ = pool2.run(nf4_runs.weights, path, quant, torch.bfloat16, tp=2)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


LAYOUTS = {
    "tp1": (dict(), dict()),
    "tp2-adapted-first": (dict(tp=2), dict(first="adapt")),
    "tp2-sp-recompute": (dict(tp=2, sp=True), dict(recompute="full")),
    "pp2": (dict(pp=2), dict()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_gradients(pool1, pool2, oracle, layout):
    sizes, kwargs = LAYOUTS[layout]
    path, _, logits, grads = oracle
    results = (pool2 if sizes else pool1).run(nf4_runs.parity, path, logits, grads, TOKENS, kwargs, **sizes)
    assert sum(r["adapters"] for r in results) == 8 * len(results) // sizes.get("pp", 1)
    assert any("logits" in r for r in results)
    for r in results:
        assert r.get("logits", 0) <= 1e-5
        assert r["A"] <= 1e-4 and r["B"] <= 1e-4
