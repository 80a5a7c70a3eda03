"""bitsandbytes' own 4-bit checkpoints, as transformers writes them: the weights and logits that transformers has.

pytest tests/quant/test_nf4_checkpoints.py
"""

from __future__ import annotations

import nf4_oracle
import nf4_runs
import pytest
import reference
import torch
from transformers import AutoModelForCausalLM

from slime_plugins.lora import BaseQuant
from slime_plugins.lora.base.checkpoint import BaseCheckpoint

TOKENS = reference.batch(128)
FORMS = {"nested": True, "plain": False}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """form -> (checkpoint in codes, what transformers has of it when it loads it)."""
    cache = {}

    def get(form):
        if form not in cache:
            dense = nf4_oracle.checkpoint(tmp_path_factory, dtype=torch.bfloat16)
            path = nf4_oracle.saved_in_codes(dense, tmp_path_factory.mktemp(form) / "base", double_quant=FORMS[form])
            cache[form] = path, nf4_oracle.dequantised(AutoModelForCausalLM.from_pretrained(path))
        return cache[form]

    return get


@pytest.mark.parametrize("form", FORMS)
def test_read_dense(saved, form):
    """Whole, and in parts that blocks do not fit."""
    path, expected = saved(form)
    base = BaseCheckpoint(path)
    assert base.linears >= set(expected) and len(base.coded) == len(expected) == 14
    for name, weight in expected.items():
        stored = base.weights[f"{name}.weight"]
        assert stored.shape == weight.shape and torch.equal(stored.read(), weight)
        for dim in (0, 1):
            third = base.read(f"{name}.weight", dim=dim, part=1, parts=4)
            assert torch.equal(third, weight.chunk(4, dim)[1])


@pytest.mark.parametrize("form, sizes", [("nested", {}), ("nested", dict(tp=2)), ("plain", dict(tp=2))], ids=str)
def test_codes_are_taken_as_they_are(pool1, pool2, saved, form, sizes):
    path, expected = saved(form)
    pool, quant = pool2 if sizes else pool1, BaseQuant(double_quant=FORMS[form])
    for dtype in (torch.bfloat16, torch.float32):
        for found in pool.run(nf4_runs.weights, path, quant, dtype, path, **sizes):
            assert found.keys() == expected.keys()
            assert [name for name in expected if not torch.equal(found[name], expected[name].to(dtype))] == []


def test_new_codes_would_be_others(pool1, saved):
    """What taking the checkpoint's codes is for."""
    path, expected = saved("nested")
    (found,) = pool1.run(nf4_runs.weights, path, BaseQuant(), torch.bfloat16)
    assert any(not torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("quant", [None, BaseQuant()], ids=["dense", "nf4"])
@pytest.mark.parametrize("sizes", [{}, dict(tp=2, sp=True)], ids=str)
def test_logits_and_gradients(pool1, pool2, tmp_path_factory, quant, sizes):
    path = nf4_oracle.checkpoint(tmp_path_factory)
    path = nf4_oracle.saved_in_codes(path, tmp_path_factory.mktemp("fp32") / "base", torch.float32)
    model = reference.peft_model(path, rank=nf4_oracle.RANK, alpha=nf4_oracle.ALPHA).train()
    logits, _, grads = reference.logits_loss_grads(model, TOKENS)
    kwargs = dict(quant=quant, codes_of=path)
    for r in (pool2 if sizes else pool1).run(nf4_runs.parity, path, logits, grads, TOKENS, kwargs, **sizes):
        assert r["logits"] <= 1e-5
        assert r["A"] <= 1e-4 and r["B"] <= 1e-4
