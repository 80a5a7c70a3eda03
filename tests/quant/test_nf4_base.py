"""A 4-bit base against transformers + bitsandbytes + PEFT in one process, and against the dense base of its weights.

pytest tests/quant/test_nf4_base.py
"""

from __future__ import annotations

import math
import re

import nf4_oracle
import nf4_runs
import pytest
import reference
import te_models
import torch

from slime_plugins.lora import BaseQuant
from slime_plugins.lora.base.decoder import HFBase
from slime_plugins.lora.cost.memory import cost_of
from slime_plugins.lora.cost.model import Model, Split
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.quant import nf4
from slime_plugins.lora.quant.packed import Packed

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


@pytest.mark.slow
def test_weights_at_tensor_parallel_size_4(pool4, oracle, tmp_path_factory):
    path = nf4_oracle.checkpoint(tmp_path_factory, head_dim=64, ffn=768)
    expected = nf4_oracle.dequantised(nf4_oracle.peft_model(path))
    found = pool4.run(nf4_runs.weights, path, tp=4)[3]
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "plain"])
def test_bf16_weights(pool2, tmp_path_factory, double_quant):
    path = nf4_oracle.checkpoint(tmp_path_factory, dtype=torch.bfloat16)
    expected = nf4_oracle.dequantised(nf4_oracle.peft_model(path, torch.bfloat16, double_quant))
    quant = BaseQuant(double_quant=double_quant)
    found, _ = pool2.run(nf4_runs.weights, path, quant, torch.bfloat16, tp=2)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_statistics_per_shard_are_other_bits(pool2, tmp_path_factory):
    """What gathering the scales is for: a third of bf16 weights would differ."""
    path = nf4_oracle.checkpoint(tmp_path_factory, dtype=torch.bfloat16)
    expected = nf4_oracle.dequantised(nf4_oracle.peft_model(path, torch.bfloat16))
    found, _ = pool2.run(nf4_runs.weights_of_statistics_per_shard, path, BaseQuant(), torch.bfloat16, tp=2)
    differ = torch.cat([(found[name] != expected[name]).flatten() for name in expected]).float().mean()
    assert 0.1 < differ < 0.5


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


@pytest.fixture(scope="module")
def dense(oracle, tmp_path_factory):
    """The same checkpoint with the dequantised weights in it."""
    path, weights, *_ = oracle
    return nf4_oracle.dense_copy(path, weights, tmp_path_factory.mktemp("dense") / "checkpoint")


TE = dict(layer_spec=te_models.te_layer_spec)


@pytest.mark.parametrize(
    "sizes, kwargs",
    [
        (dict(tp=2), dict()),
        (dict(tp=2, sp=True), dict(recompute="full")),
        (dict(tp=2, sp=True), TE),
        (dict(pp=2), TE | dict(recompute="full")),
    ],
    ids=["tp2", "tp2-sp-recompute", "te-tp2-sp", "te-pp2-recompute"],
)
def test_packed_is_dense_bit_for_bit(request, oracle, dense, sizes, kwargs):
    """Logits, gradients, merged weights, logits inside ``merged``."""
    pool = request.getfixturevalue("te_pool2" if "layer_spec" in kwargs else "pool2")
    on_codes = pool.run(nf4_runs.everything, oracle[0], TOKENS, kwargs, **sizes)
    on_dense = pool.run(nf4_runs.everything, dense, TOKENS, kwargs | dict(quant=None), **sizes)
    for packed, plain in zip(on_codes, on_dense):
        assert packed.keys() == plain.keys() and len(packed) == 2 + 3 * 8 // sizes.get("pp", 1)
        differ = [key for key in packed if plain[key] is not None and not torch.equal(packed[key], plain[key])]
        assert differ == []


@pytest.mark.parametrize("spec", ["local", "te"])
@pytest.mark.parametrize("recompute", [None, "full"])
def test_nothing_dense_stays_alive(request, oracle, spec, recompute):
    pool = request.getfixturevalue("te_pool2" if spec == "te" else "pool2")
    kwargs = dict(recompute=recompute) | (TE if spec == "te" else {})
    for alive in pool.run(nf4_runs.alive_bytes, oracle[0], TOKENS, kwargs):
        assert alive == (0, 0, 0)


def test_a_weight_that_stays_alive_shows(te_pool2, pool2, oracle):
    """TransformerEngine's context keeps a weight that is not freed, and autograd keeps one that is saved as it is."""
    one_layer = sum(w.nbytes for name, w in oracle[1].items() if ".layers.0." in name)
    _, between, _ = te_pool2.run(nf4_runs.alive_bytes, oracle[0], TOKENS, TE, "not freed")[0]
    assert 0 < between < 2 * one_layer  # of the fused norm and linear alone
    _, between, _ = pool2.run(nf4_runs.alive_bytes, oracle[0], TOKENS, {}, "saved")[0]
    unsaved = sum(oracle[1][f"model.layers.0.self_attn.{p}_proj"].nbytes for p in "qkv")  # its input has no gradient
    assert between == 2 * one_layer - unsaved


def test_what_is_said_of_the_base(pool2, oracle):
    """Report, names and fingerprint are the dense model's; bytes; adapters off; ``merged`` and back."""
    path, weights, *_ = oracle
    packed, plain = (pool2.run(nf4_runs.facts, path, TOKENS, quant, tp=2)[0] for quant in (BaseQuant(), None))
    assert packed["fingerprint"].pop("quantization") == BaseQuant().to_dict()
    assert packed["report"].count("a base in codes") == 1
    packed["report"] = packed["report"].replace("a base in codes", "asked for")
    for key in ("report", "names", "fingerprint"):
        assert packed[key] == plain[key]
    assert packed["merged"] <= 1e-5 and packed["restored"]
    assert not torch.equal(packed["off"], plain["off"])
    assert packed["parameters"] == sum(w.numel() for w in weights.values()) // 2
    model, flags = Model.of(HFBase.read(path)), (nf4_runs.CONFIG, Split(tp=2))
    saved = [
        cost_of(model, *flags, dtype="float32", base_quant=quant).lora.base_weights for quant in (None, BaseQuant())
    ]
    assert saved[0] - saved[1] == 4 * packed["parameters"] - packed["bytes"]  # as ``slime-lora plan`` has it
    quantised = packed["quantised"]
    assert (quantised.parameters, quantised.packed_bytes) == (packed["parameters"], packed["bytes"])
    assert quantised.dense_bytes == 4 * packed["parameters"] and quantised.matrices == 8


def test_twenty_steps_at_two_sizes(pool1, pool2, oracle):
    losses, norms, adapters = pool1.run(nf4_runs.train, oracle[0], BaseQuant(), 20)[0]
    assert losses[-1] != losses[0] and min(norms) > 1e-3
    for other_losses, other_norms, other in pool2.run(nf4_runs.train, oracle[0], BaseQuant(), 20, tp=2):
        assert other_norms == pytest.approx(norms, rel=1e-6)
        assert other_losses == pytest.approx(losses, rel=1e-5)
        largest = max(tensor.abs().max() for tensor in adapters.values())
        for key, tensor in other.items():
            assert (tensor - adapters[key]).abs().max() <= 1e-6 * largest, key


def test_bytes():
    """What is kept is what ``bytes_of`` says, and at real widths it is at most 0.52 a weight."""
    shape, quant = (512, 2048), BaseQuant()
    packed = Packed.of(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    assert packed.nbytes == BaseQuant(double_quant=False).bytes_of(shape) == 9 * math.prod(shape) // 16
    packed.seal(nf4.whole_scales(packed.absmax))
    assert packed.nbytes == quant.bytes_of(shape)
    for rows, columns, cut in ((5120, 5120, "column"), (5120, 25600, "row"), (25600, 5120, "column")):
        for shards in (1, 8):
            assert quant.bytes_of((rows, columns), shards=shards, cut=cut) * shards <= 0.52 * rows * columns


def test_a_packed_weight_as_a_tensor(pool1, oracle):
    found = pool1.run(nf4_runs.tensor_facts, oracle[0])[0]
    assert found.pop("said") == "PackedWeight([192, 256], torch.float32, nf4, device=cpu)"
    assert found.pop("looks") == (torch.Size([192, 256]), torch.float32, False, "cpu")
    for key in ("add", "data", "zeros"):
        assert "writes to a 4-bit base weight" in found.pop(key)
    assert "4-bit weights do not change" in found.pop("copy")
    assert "has become dense torch.bfloat16; build the model in" in found.pop("cast model")
    assert all(found.values()), found


@pytest.mark.parametrize(
    "quant, kwargs, sizes, kind, words",
    [
        (BaseQuant(), dict(twice=True), {}, "ValueError", "linear_proj is in 4 bits already"),
        (BaseQuant(), dict(trains=True), {}, "UsageError", "trains .*4-bit weights are frozen"),
        (BaseQuant(), dict(wrapped=True), {}, "ValueError", "DDP has wrapped already"),
        (BaseQuant(exclude=("q_proj",)), {}, {}, "UsageError", "one matrix in Megatron; name k_proj, v_proj too, or"),
        (BaseQuant(exclude=("c_attn",)), {}, {}, "UsageError", "match no module: c_attn"),
        (
            BaseQuant(),
            {},
            dict(tp=2),
            "UsageError",
            "linear_fc2: 192 inputs cut in 2 do not divide .*--lora-base-quant",
        ),
    ],
)
def test_refused(request, tmp_path_factory, oracle, quant, kwargs, sizes, kind, words):
    path = nf4_oracle.checkpoint(tmp_path_factory, ffn=192) if sizes else oracle[0]
    pool = request.getfixturevalue("pool2" if sizes else "pool1")
    for name, message in pool.run(nf4_runs.refused, path, quant, kwargs, **sizes):
        assert name == kind and re.search(words, message) and "\n" not in message


def test_excluded_linears_stay_dense(pool2, oracle):
    report = pool2.run(
        nf4_runs.facts, oracle[0], TOKENS, BaseQuant(exclude=("linear_fc2", "*.layers.1.*.o_proj")), tp=2
    )
    names = ("decoder.layers.0.mlp.linear_fc2", "decoder.layers.1.mlp.linear_fc2")
    assert report[0]["quantised"].excluded == (*names, "decoder.layers.1.self_attention.linear_proj")
    assert report[0]["quantised"].matrices == 5


def test_other_forms_are_refused():
    with pytest.raises(UsageError, match="'fp4' is not known; expected nf4"):
        BaseQuant(form="fp4")
