"""What engines that run a quantised copy get of an update: against quantisers written from the schemes' definitions.

pytest tests/slime/hooks/test_quantised_sync.py
"""

from __future__ import annotations

import engine_quantisers as reference
import pytest
import quantised_syncs
import torch
from tiny_checkpoints import tiny

from slime_plugins.lora.slime.hooks import quantised_sync
from slime_plugins.lora.slime.hooks.engine_scheme import Scheme, scheme_of

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("kind", list(reference.CONFIGS))
@pytest.mark.parametrize("rows", [slice(0, 40), slice(16, 32), slice(32, 40)], ids=["all", "middle", "end"])
def test_a_copy_is_read_as_it_is_defined(kind, rows):
    config = reference.CONFIGS[kind]
    weight = torch.randn(40, 96 if kind == "int4" else 72, generator=torch.Generator().manual_seed(1)).bfloat16()
    sent = dict(reference.quantise(NAME, weight, config))
    expected = reference.dequantise(sent, config)
    assert (expected - weight).norm() < 0.15 * weight.float().norm(), "the reference reads something else"
    assert torch.equal(quantised_sync.dequantised(scheme_of(config), sent, NAME, rows), expected[rows])


@pytest.mark.parametrize("columns", [512, 640], ids=["whole", "padded"])
def test_scales_that_deepgemm_packs(columns):
    """Blackwell: slime sends scales that are powers of two, four to an int32."""
    weight = torch.randn(200, columns, generator=torch.Generator().manual_seed(2)) * torch.logspace(-3, 2, columns)
    codes, scales = reference.fp8(weight, (128, 128))
    powers, packed = reference.ue8m0(scales, 128, 200)
    expected = codes.float() * powers.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)
    sent = {NAME: codes, NAME + "_scale_inv": packed}
    for rows in (slice(0, 200), slice(128, 200)):
        assert torch.equal(quantised_sync.dequantised(Scheme("fp8", (128, 128)), sent, NAME, rows), expected[rows])


@pytest.mark.parametrize("kind", list(reference.CONFIGS))
@pytest.mark.parametrize("rows", [40, 4200], ids=["one piece", "pieces"])
def test_lost_is_the_formula(kind, rows):
    config, made = reference.CONFIGS[kind], torch.Generator().manual_seed(3)
    if rows > 40 and kind == "fp8 blocks":
        config = {**config, "weight_block_size": [257, 32]}  # pieces start at blocks
    weight = torch.randn(rows, 32, generator=made).bfloat16()
    update = torch.randn(rows, 32, generator=made) * 0.05
    merged = (weight + update).bfloat16()
    loss = quantised_sync.Loss(scheme_of(config))
    loss.add(*(dict(reference.quantise(NAME, w, config)) for w in (merged, weight)), NAME, update)
    seen = (float(loss.error) / float(loss.update)) ** 0.5
    assert seen == pytest.approx(reference.lost([(weight, merged, update)], config), rel=1e-5) and seen > 0.1


@pytest.mark.parametrize("kind", list(reference.CONFIGS))
def test_an_update_below_the_step_is_lost_whole_and_one_of_steps_arrives(kind):
    config = reference.CONFIGS[kind]
    # On the grid of all three schemes; the first of every block keeps the scale as it is.
    weight = torch.full((16, 32), 2.0)
    weight[:, ::16] = 448.0 if kind != "int4" else 7.0
    for size, expected in ((0.01, 1.0), (1.0, 0.0)):
        update = torch.full((16, 32), size)
        update[:, ::16] = 0
        loss = quantised_sync.Loss(scheme_of(config))
        loss.add(*(dict(reference.quantise(NAME, w, config)) for w in (weight + update, weight)), NAME, update)
        assert (float(loss.error) / float(loss.update)) ** 0.5 == pytest.approx(expected, abs=1e-6), size


def test_what_a_quantiser_leaves_dense_is_read_as_it_is():
    for kind in ("fp8 blocks", "int4"):
        loss = quantised_sync.Loss(scheme_of(reference.CONFIGS[kind]))
        weight, update = torch.ones(8, 8).bfloat16(), torch.full((8, 8), 2.0**-12)
        loss.add({NAME: (weight + update).bfloat16()}, {NAME: weight}, NAME, update)
        assert float(loss.error) == float(loss.update) > 0, "bf16 has no such step beside 1"


@pytest.mark.parametrize(
    "sent, reason",
    [
        ({}, "made nothing of"),
        ({NAME: torch.zeros(8, 8, dtype=torch.int8)}, "made torch.int8 of"),
        ({NAME: torch.zeros(8, 8).to(torch.float8_e4m3fn)}, "made .* without .*weight_scale_inv"),
        (
            {NAME: torch.zeros(8, 8).to(torch.float8_e5m2), NAME + "_scale_inv": torch.ones(1, 1)},
            "made torch.float8_e5m2 of",
        ),
    ],
)
def test_what_is_not_known_is_named(sent, reason):
    scheme = Scheme("fp8", (128, 128))
    with pytest.raises(ValueError, match=f"(?s)^slime {reason}.*which is no FP8, one scale per 128 x 128$"):
        quantised_sync.dequantised(scheme, sent, NAME, slice(0, 8))
    with pytest.raises(ValueError, match="3 dimensions, expected 2"):
        quantised_sync.Loss(scheme).add({}, {}, NAME, torch.zeros(2, 8, 8))


def test_the_sample_has_every_kind_and_is_small():
    layers = [f"module.module.decoder.layers.{i}." for i in range(36)]
    names = [layer + f"self_attention.{leaf}.weight" for layer in layers for leaf in ("linear_qkv", "linear_proj")]
    names += [layer + f"mlp.experts.linear_fc1.weight{i}" for layer in layers for i in range(128)]
    names += [
        layer + f"self_attention.{x}.weight" for layer in layers for x in ("linear_q_down_proj", "linear_kv_up_proj")
    ]
    chosen = [name for name, _ in quantised_sync.sample((name, None) for name in names)]
    assert chosen == [
        *(layers[i] + "self_attention.linear_qkv.weight" for i in (9, 27)),
        *(layers[i] + "self_attention.linear_proj.weight" for i in (9, 27)),
        *(layers[i] + "mlp.experts.linear_fc1.weight0" for i in (9, 27)),
        *(layers[i] + "self_attention.linear_kv_up_proj.weight" for i in (9, 27)),
    ]
    assert quantised_sync.sample([("decoder.layers.0.mlp.linear_fc1.weight", 1)]) == [
        ("decoder.layers.0.mlp.linear_fc1.weight", 1)
    ]


@pytest.mark.parametrize(
    "config, expected",
    [
        (reference.CONFIGS["fp8 blocks"], "FP8, one scale per 16 x 32"),
        (reference.CONFIGS["fp8 tensor"], "FP8, one scale per tensor"),
        (reference.CONFIGS["int4"], "INT4, one scale per 1 x 16"),
        (None, "None"),
        ({"quant_method": "mxfp4"}, "None"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "None"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "None"),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {
            "num_bits": 4, "symmetric": False, "group_size": 32}}}}, "None"),
    ],
)  # fmt: skip
def test_schemes(config, expected):
    assert str(scheme_of(config)) == expected


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    return tiny(tmp_path_factory)


@pytest.mark.parametrize(
    "kind, sizes, offload",
    [("fp8 blocks", dict(tp=2, sp=True), False), ("int4", dict(pp=2), False), ("fp8 tensor", dict(tp=2), True)],
    ids=["fp8-blocks-tp2", "int4-pp2", "fp8-tensor-tp2-offload"],
)
def test_sync_lost_is_of_what_engines_get(pool2, hf_dir, kind, sizes, offload):
    """Whole matrices, not shards; either way of gathering; the sync itself is what it was."""
    for seen in pool2.run(quantised_syncs.run, hf_dir, reference.CONFIGS[kind], offload, **sizes):
        for way, lost in seen["lost"].items():
            assert lost == pytest.approx(seen["expected"], rel=1e-4), way
        assert seen["expected"] > 0.1
        assert seen["same as without"] and seen["calls"] == [seen["sampled"] * 3] * 2, "measured once per sync"
        warned = seen["warned"]
        assert len(warned) == int(seen["logs"]), "said once, where losses are logged"
        for text in warned:
            assert (
                f"sync_lost is {seen['expected']:.2f} after slime's quantiser ({scheme_of(reference.CONFIGS[kind])})"
                in text
            )
            assert "--lora-sync adapter" in text and "no such loss" in text
        assert seen["before the first step"] == 0.0
        assert seen["unknown"] == (None, 1), "a form that is not known: no number, one warning"
