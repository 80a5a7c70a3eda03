"""Names in both vocabularies select the projections they should, and nothing is left unsaid.

pytest tests/core/test_targets.py
"""

from __future__ import annotations

import pytest

from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.names import LINEARS, hf_names, megatron_name, of_expert, spellings
from slime_plugins.lora.targets import Targets, check_all_matched, matches

QKV, PROJ = "decoder.layers.{}.self_attention.linear_qkv", "decoder.layers.{}.self_attention.linear_proj"
FC1, FC2 = "decoder.layers.{}.mlp.linear_fc1", "decoder.layers.{}.mlp.linear_fc2"
DENSE = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def selected(layers, targets, exclude=()):
    chosen = Targets(targets, exclude)
    names = [name.format(i) for i in layers for name in (QKV, PROJ, FC1, FC2)]
    return {name: parts for name in names if (parts := chosen.parts_of(name))}, chosen


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        (["all-linear"], [], {QKV: (0, 1, 2), PROJ: (0,), FC1: (0, 1), FC2: (0,)}),
        (["linear_qkv"], [], {QKV: (0, 1, 2)}),
        (["q_proj"], [], {QKV: (0,)}),
        (["v_proj", "q_proj"], [], {QKV: (0, 2)}),
        (["gate_proj", "up_proj", "down_proj"], [], {FC1: (0, 1), FC2: (0,)}),
        (["self_attn.o_proj"], [], {PROJ: (0,)}),
        (["self_attention.linear_qkv"], ["k_proj"], {QKV: (0, 2)}),
        (["all-linear"], ["linear_fc1", "o_proj"], {QKV: (0, 1, 2), FC2: (0,)}),
        (["*.mlp.*"], [], {FC1: (0, 1), FC2: (0,)}),
        (["model.layers.*.up_proj"], [], {FC1: (1,)}),
    ],
)
def test_selection(targets, exclude, expected):
    chosen, entries = selected([3], targets, exclude)
    assert chosen == {name.format(3): parts for name, parts in expected.items()}
    assert entries.matched == {*targets, *exclude}


def test_wildcards_choose_layers():
    chosen, _ = selected(range(12), ["*.layers.1.*.linear_qkv", "decoder.layers.[23].mlp.linear_fc2"])
    assert chosen == {QKV.format(1): (0, 1, 2), FC2.format(2): (0,), FC2.format(3): (0,)}


def test_a_plain_name_is_a_dotted_suffix_not_any_suffix():
    assert matches("linear_qkv", "a.linear_qkv") and not matches("qkv", "a.linear_qkv")
    assert not matches("proj", "model.layers.0.self_attn.q_proj")


def test_an_unmatched_name_lists_what_could_have_been_named():
    chosen, entries = selected([0], ["q_proj", "qkv", "*.layers.9.*"], ["lm_head"])
    with pytest.raises(UsageError) as caught:
        check_all_matched(entries, entries.matched, [name.format(0) for name in (QKV, PROJ, FC1, FC2)])
    text = str(caught.value)
    assert text.startswith("LoRA target or exclude names that match no module: qkv, *.layers.9.*, lm_head.")
    assert all(name in text for name in (*DENSE, "q_proj", "down_proj", "all-linear", QKV.format(0)))
    assert chosen and "q_proj, qkv" not in text


def test_names_go_both_ways():
    for path in LINEARS:
        name = f"decoder.layers.17.{path}"
        for i, hf in enumerate(hf_names(name)):
            for spelling in spellings(hf):
                assert spelling.startswith("model.layers.17.")
                assert megatron_name(spelling, mla="linear_q_proj" in name) == (name, i)
    for leaf in ("linear_fc1", "linear_fc2"):
        one = of_expert(f"decoder.layers.17.mlp.experts.{leaf}", 12)
        assert one == f"decoder.layers.17.mlp.experts.12.{leaf}"
        for i, hf in enumerate(hf_names(one)):
            assert hf.startswith("model.layers.17.mlp.experts.12.") and megatron_name(hf) == (one, i)
    for unknown in ("decoder.layers.1.mlp.linear_qkv", "decoder.layers.x.mlp.linear_fc1"):
        with pytest.raises(KeyError, match="no Hugging Face name is known"):
            hf_names(unknown)
    with pytest.raises(KeyError, match="no Megatron module is known"):
        megatron_name("model.layers.0.mlp.q_proj")
