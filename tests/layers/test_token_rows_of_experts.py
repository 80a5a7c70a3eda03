"""Trained vocabulary rows of a model with experts, split over ranks, against PEFT in one process.

pytest tests/layers/test_token_rows_of_experts.py            # EP 2
pytest tests/layers/test_token_rows_of_experts.py -m ""      # and EP 2 under TP 2 with SP
"""

from __future__ import annotations

import json

import adapted
import moe_models
import moe_reference
import moe_runs
import pytest
import reference
import row_runs
from harness import Layout
from safetensors.torch import load_file, save_file

from slime_plugins.lora import LoRAConfig

IDS = (5, 17, 47, 48, 70, 90)
"""On both ranks of TP 2."""
BATCHES = row_runs.batches(moe_models.VOCAB)


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def lora(*targets: str) -> LoRAConfig:
    sizes = dict(rank=moe_runs.RANK, alpha=moe_runs.ALPHA, layout="split")
    return LoRAConfig(**sizes, target_modules=targets, trainable_token_indices=IDS)


def train_rows(layout: Layout, base, config, values, distributed_optimizer, steps=row_runs.STEPS):
    chunks = moe_runs.chunks_of(layout, base, False, config, values)
    return row_runs.train(chunks, BATCHES, last=steps, distributed_optimizer=distributed_optimizer)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return moe_models.make_checkpoint(tmp_path_factory.mktemp("experts"), "qwen3_moe")


@pytest.fixture(scope="module")
def values(base):
    return moe_reference.values_of(base, moe_runs.RANK, "split")


def put_rows(base, adapter):
    """PEFT's fields and tensors for rows that are the base's."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["trainable_token_indices"] = {"embed_tokens": list(IDS), "lm_head": list(IDS)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    tensors, weights = load_file(adapter / "adapter_model.safetensors"), load_file(base / "model.safetensors")
    for module in ("model.embed_tokens", "lm_head"):
        key = f"base_model.model.{module}.token_adapter.trainable_tokens_delta"
        tensors[key] = weights[f"{module}.weight"][list(IDS)]
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})


SPLITS = [
    pytest.param({"ep": 2, "etp": 1}, id="ep2"),
    pytest.param({"tp": 2, "sp": True, "ep": 2, "etp": 1}, id="tp2-sp-ep2", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def beside_attention(base):
    """Of PEFT: five steps."""
    rows = {"embed_tokens": list(IDS), "lm_head": list(IDS)}
    how = dict(rank=moe_runs.RANK, alpha=moe_runs.ALPHA, layout="split", trainable_token_indices=rows)
    return row_runs.of_peft(reference.peft_model(base, targets=ATTENTION, **how), BATCHES)


@pytest.mark.parametrize("sizes", SPLITS)
def test_beside_attention(pool2, base, values, beside_attention, sizes):
    for distributed in (False, True):
        results = pool2.run(train_rows, base, lora("linear_qkv", "linear_proj"), values, distributed, **sizes)
        row_runs.check(results, beside_attention, whole_gradients=not distributed or "tp" in sizes)


@pytest.mark.parametrize("sizes", SPLITS)
def test_beside_experts(pool2, base, values, sizes):
    """One step: of a pair of projections in one tensor PEFT trains more than they have, so further ones differ."""
    adapter = moe_reference.write_adapter(base / "adapter", base, values, rank=moe_runs.RANK, alpha=moe_runs.ALPHA)
    put_rows(base, adapter)
    expected, _, _ = row_runs.of_peft(moe_reference.peft_model(base, adapter), BATCHES[:1])
    for found, _, _, frozen in pool2.run(train_rows, base, lora("all-linear"), values, False, 1, **sizes):
        assert frozen and [name for name, _ in found] == list(expected)
        for name, grad in found:
            assert adapted.relative(grad - expected[name], expected[name]) <= 1e-5, name
