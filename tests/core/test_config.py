"""LoRAConfig: what it refuses, what its patterns mean, and that it survives JSON.

pytest tests/core/test_config.py
"""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from slime_plugins.lora import LoRAConfig
from slime_plugins.lora.errors import UsageError

Q3, QKV3 = "model.layers.3.self_attn.q_proj", "decoder.layers.3.self_attention.linear_qkv"


def test_defaults():
    config = LoRAConfig()
    assert (config.rank, config.alpha, config.dropout, config.layout) == (8, 16, 0.0, "fused")
    assert config.target_modules == ("all-linear",) and config.scaling() == 2.0


def test_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoRAConfig().rank = 4
    with pytest.raises(TypeError):
        LoRAConfig(4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank": 0}, ["rank is 0", "at least 1"]),
        ({"rank": -3}, ["rank is -3"]),
        ({"rank": 2.5}, ["rank is 2.5"]),
        ({"rank": True}, ["rank is True"]),
        ({"alpha": 0}, ["alpha is 0", "in silence"]),
        ({"alpha": float("nan")}, ["alpha is nan"]),
        ({"alpha": -1}, ["alpha is -1"]),
        ({"dropout": 1.0}, ["dropout is 1.0", "[0, 1)"]),
        ({"dropout": -0.1}, ["dropout is -0.1"]),
        ({"target_modules": ()}, ["target_modules is empty"]),
        ({"target_modules": ("",)}, ["target_modules is empty"]),
        ({"layout": "canonical"}, ["'canonical'", "fused, split"]),
        ({"init": "zeros"}, ["'zeros'", "kaiming, gaussian"]),
        ({"dtype": "fp8"}, ["'fp8'", "float32, bfloat16, float16"]),
        ({"rank_pattern": {"q_proj": 0}}, ["rank_pattern['q_proj'] is 0"]),
        ({"alpha_pattern": {"q_proj": "2"}}, ["alpha_pattern['q_proj'] is '2'"]),
    ],
)
def test_nonsense_is_refused_by_name(fields, words):
    with pytest.raises(UsageError) as caught:
        LoRAConfig(**fields)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_a_single_target_needs_no_tuple():
    assert LoRAConfig(target_modules="q_proj").target_modules == ("q_proj",)


def test_scaling():
    assert LoRAConfig(rank=4, alpha=6).scaling() == 1.5
    assert LoRAConfig(rank=4, alpha=6, use_rslora=True).scaling() == 3.0
    config = LoRAConfig(rank=4, alpha=6, rank_pattern={"q_proj": 9}, alpha_pattern={"linear_qkv": 18}, use_rslora=True)
    assert config.scaling(QKV3, Q3) == 18 / math.sqrt(9)
    assert config.scaling("decoder.layers.3.mlp.linear_fc1") == 3.0


def test_patterns_match_either_vocabulary_and_wildcards():
    config = LoRAConfig(rank=4, rank_pattern={"*.layers.3.*": 7, "linear_qkv": 5})
    assert config.rank_of(QKV3, Q3) == 7
    assert config.rank_of(QKV3.replace("3", "4"), Q3.replace("3", "4")) == 5
    assert config.rank_of("decoder.layers.4.mlp.linear_fc1") == 4


def test_survives_json():
    config = LoRAConfig(rank=3, target_modules=("q_proj", "down_proj"), rank_pattern={"q_proj": 2}, layout="split")
    assert LoRAConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_to_peft_is_what_peft_reads():
    peft = pytest.importorskip("peft")
    written = LoRAConfig(dropout=0.1).to_peft(base_model="base", target_modules=["q_proj"], rank=8, alpha=16.0)
    read = peft.LoraConfig(**written)
    assert (read.r, read.lora_alpha, read.target_modules, read.base_model_name_or_path) == (8, 16, {"q_proj"}, "base")
    assert not read.use_rslora and not read.rank_pattern and isinstance(written["lora_alpha"], int)
