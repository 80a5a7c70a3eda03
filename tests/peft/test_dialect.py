"""Linear attention as SGLang takes it: the same update in other pieces. Its own code judges in tests/contracts.

pytest tests/peft/test_dialect.py
"""

from __future__ import annotations

import families
import pytest
import torch
from test_families import projections

from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.peft.config import key_of
from slime_plugins.lora.peft.dialect import for_sglang
from slime_plugins.lora.peft.form import to_peft

LAYER = "model.language_model.layers.0.linear_attn"
KEYS, VALUES = 16, 32


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return BaseCheckpoint(families.make(tmp_path_factory.mktemp("base"), "qwen3_5"))


def update(tensors, module):
    return tensors[key_of(module, "B")] @ tensors[key_of(module, "A")]


@pytest.mark.parametrize("leaves", [("in_proj_qkv", "in_proj_z"), ("in_proj_qkv",), ("in_proj_z",)], ids="-".join)
def test_slices_are_the_same_update(base, leaves):
    adapted = [p for p in projections(base) if not p.name.endswith(("in_proj_qkv", "in_proj_z"))]
    adapted += [p for p in projections(base) if p.name.endswith(leaves)]
    config, tensors = to_peft(adapted, base)
    served_config, served = for_sglang(config, tensors, base)
    assert not any("in_proj_qkv" in key for key in served)
    assert {"in_proj_qkvz", "q_proj", "out_proj"} <= set(served_config["target_modules"])
    assert not {"in_proj_qkv", "in_proj_z"} & set(served_config["target_modules"])
    q, k, v, z = (update(served, f"{LAYER}.in_proj_{leaf}") for leaf in "qkvz")
    assert (q.shape[0], k.shape[0], v.shape[0], z.shape[0]) == (KEYS, KEYS, VALUES, VALUES)
    for leaf, found in (("in_proj_qkv", torch.cat([q, k, v])), ("in_proj_z", z)):
        expected = update(tensors, f"{LAYER}.{leaf}") if leaf in leaves else torch.zeros_like(found)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    others = {key for key in tensors if "in_proj" not in key}
    assert {key: id(served[key]) for key in others} == {key: id(tensors[key]) for key in others}


def test_an_adapter_without_linear_attention_is_passed_on(base):
    adapter = to_peft([p for p in projections(base) if ".self_attn." in p.name], base)
    config, tensors = for_sglang(*adapter, base)
    assert config == adapter[0] and tensors.keys() == adapter[1].keys()
