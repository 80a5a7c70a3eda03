"""A 4-bit base in slime's hooks: built in codes, loaded shard by shard, synced, resumed.

pytest tests/quant/test_nf4_slime.py
"""

from __future__ import annotations

import nf4_oracle
import nf4_slime_runs
import pytest
import torch


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """dtype -> (checkpoint, the same with dequantised weights)."""
    cache = {}

    def get(dtype):
        if dtype not in cache:
            path = nf4_oracle.checkpoint(tmp_path_factory, dtype=dtype)
            names = [f"model.layers.{layer}.self_attn.{p}_proj" for layer in range(2) for p in "qkvo"]
            names += [f"model.layers.{layer}.mlp.{p}_proj" for layer in range(2) for p in ("gate", "up", "down")]
            weights = nf4_oracle.through_codes(path, names)
            cache[dtype] = path, nf4_oracle.dense_copy(path, weights, tmp_path_factory.mktemp("dense") / "checkpoint")
        return cache[dtype]

    return get


@pytest.mark.parametrize(
    "dtype, sizes", [(torch.float32, dict()), (torch.bfloat16, dict(tp=2))], ids=["tp1", "tp2-bf16"]
)
def test_from_building_to_resuming(pool1, pool2, bases, tmp_path, dtype, sizes):
    path, dense = bases(dtype)
    pool = pool2 if sizes else pool1
    for seen in pool.run(nf4_slime_runs.whole_life, path, dense, tmp_path, dtype, **sizes):
        assert seen["packed while built"] == 8 and seen["nan"]
        assert seen["dense after load"] == 0
        assert seen["sent"] == [[], []] and seen["names"]  # round(dequantised + scaling B A), bit for bit
        assert seen["bytes"][0] == seen["bytes"][1]
        assert seen["policy"] and seen["reference"] and seen["resumed"]
        teacher, engines = seen["raised"]
        assert teacher.startswith("UsageError: --lora-base-quant nf4: the teacher would come from")
        assert "which is not the base that trains" in engines and "`slime-lora dequantize`" in engines
    if sizes:
        count, on_dense = pool1.run(nf4_slime_runs.resumed_elsewhere, path, tmp_path, dtype)[0]
        assert count == 4
        assert "base nf4 with nested scales in the checkpoint, dense here" in on_dense


def test_a_checkpoint_without_a_weight(pool1, bases, tmp_path):
    path, _ = bases(torch.float32)
    message = pool1.run(nf4_slime_runs.incomplete, path, tmp_path, "mlp.linear_fc1")[0]
    assert "has no weights for module.decoder.layers.0.mlp.linear_fc1.weight; is it" in message


def test_excluded(pool1, bases, tmp_path):
    path, _ = bases(torch.float32)
    packed, logits = pool1.run(nf4_slime_runs.excluded, path, tmp_path)[0]
    assert packed == ["linear_fc2", "linear_proj", "linear_qkv"] and not logits.isnan().any()
