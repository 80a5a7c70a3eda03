"""A 4-bit base in slime's hooks: built in codes, loaded shard by shard, synced, resumed.

pytest tests/quant/test_nf4_slime.py
"""

from __future__ import annotations

import json
import shutil

import nf4_oracle
import nf4_slime_runs
import pytest
import torch
from safetensors.torch import load_file

from slime_plugins.lora import BaseQuant, LoRAConfig
from slime_plugins.lora.adapters import remember
from slime_plugins.lora.base.merge import merge_checkpoint
from slime_plugins.lora.checkpoint.reader import AdapterCheckpoint
from slime_plugins.lora.cli import main
from slime_plugins.lora.cli.verify import table
from slime_plugins.lora.peft.directory import write_adapter
from slime_plugins.lora.peft.form import to_peft
from slime_plugins.lora.peft.verify import verify_adapter
from slime_plugins.lora.projections import Projection
from slime_plugins.lora.slime.hooks import checkpoints, metrics


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
        check_export(tmp_path, path, dense)


def check_export(tmp_path, path, dense):
    """The adapter says on what it was trained; merged, it lies on the dequantised base unless told otherwise."""
    export = ["export", "--checkpoint", str(tmp_path / "ckpt"), "--hf-checkpoint", str(path), "--out"]
    assert main([*export, str(tmp_path / "adapter")]) == 0
    said = table(verify_adapter(tmp_path / "adapter", path))
    assert "nf4 while it was trained: load it with BitsAndBytesConfig(load_in_4bit=True, " in said
    assert said.endswith("ok")
    projections = list(AdapterCheckpoint(tmp_path / "ckpt").projections())
    merge = ["merge", str(tmp_path / "adapter"), "--hf-checkpoint", str(path), "--out"]
    for command, flags, base in (
        (export, ("--merge",), dense),
        (merge, (), dense),
        (export, ("--merge", "--merge-onto", "original"), path),
    ):
        out = tmp_path / f"merged-{base.name}-by-{command[0]}"
        assert main([*command, str(out), *flags]) == 0
        expected = tmp_path / f"expected-{base.name}-by-{command[0]}"
        merge_checkpoint(projections, base, expected)
        merged, expected = (load_file(d / "model.safetensors") for d in (out, expected))
        assert merged.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.items())


def test_a_checkpoint_without_a_weight(pool1, bases, tmp_path):
    path, _ = bases(torch.float32)
    message = pool1.run(nf4_slime_runs.incomplete, path, tmp_path, "mlp.linear_fc1")[0]
    assert "has no weights for module.decoder.layers.0.mlp.linear_fc1.weight; is it" in message


def test_loaded_in_parts(pool2, bases, tmp_path):
    path, dense = bases(torch.bfloat16)
    expected = load_file(dense / "model.safetensors")
    found, _ = pool2.run(nf4_slime_runs.loaded_in_parts, path, tmp_path, tp=2)
    assert len(found) == 8  # the adapted linears: q, k, v and down
    assert [name for name, weight in found.items() if not torch.equal(weight, expected[f"{name}.weight"])] == []


def test_memory_while_loading(pool1, tmp_path_factory, tmp_path):
    """One linear read from the files, and above the packed base what bitsandbytes takes to encode one: on a CPU eight
    times the matrix in bf16 (float32, and places in the table)."""
    sizes = dict(num_layers=8, hidden=512, num_heads=8, num_kv_heads=4, head_dim=64, ffn=1536)
    path = nf4_oracle.checkpoint(tmp_path_factory, dtype=torch.bfloat16, **sizes)
    above, read, largest, dense = pool1.run(nf4_slime_runs.loading_peak, path, tmp_path)[0]
    print(f"{above:,} above the packed base, {read:,} read; largest {largest:,}, all dense {dense:,}")
    assert largest <= read <= 1.2 * largest
    assert largest <= above <= 9 * largest < 0.6 * dense


def test_excluded(pool1, bases, tmp_path):
    path, _ = bases(torch.float32)
    packed, logits = pool1.run(nf4_slime_runs.excluded, path, tmp_path)[0]
    assert packed == ["linear_fc2", "linear_proj", "linear_qkv"] and not logits.isnan().any()


def test_what_no_4_bit_base_is_made_of(pool1, bases, tmp_path):
    """Said before a weight is read: FP8, weights that are dequantised already, codes that this slime cannot read."""
    path, _ = bases(torch.bfloat16)
    assert main(["dequantize", "--hf-checkpoint", str(path), "--out", str(tmp_path / "dequantised")]) == 0
    shutil.copytree(path, tmp_path / "fp8")
    config = json.loads((path / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    codes = nf4_oracle.saved_in_codes(path, tmp_path / "codes")
    directories = [tmp_path / "fp8", tmp_path / "dequantised", codes]
    said = pool1.run(nf4_slime_runs.refused_bases, path, directories, tmp_path)[0]
    for error, words in zip(
        said,
        (
            "is quantised already (fp8), of which no 4-bit base is made; give the dense checkpoint",
            "weights that have been through 4-bit codes, and other codes would be made of them; drop",
            "holds NF4 codes, which slime before v0.3.1 cannot read; write its weights with `slime-lora dequantize`",
        ),
        strict=True,
    ):
        assert error.startswith("UsageError: ") and words in error


def test_engines_on_another_base_are_said_at_the_first_step(caplog, monkeypatch):
    """Once, and on a 4-bit base alone."""

    monkeypatch.setattr(metrics, "measure", lambda model: {})  # what it measures is no matter here

    def warned(difference, model):
        caplog.clear()
        losses = {} if difference is None else {"train_rollout_logprob_abs_diff": torch.tensor(difference)}
        step = metrics.measuring(lambda model: (losses, "norm"))
        assert step(model=[model])[1] == "norm"
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    def model(quant):
        chunk = torch.nn.Module()
        remember([chunk], LoRAConfig())
        chunk.lora_base_quant = quant
        return chunk

    packed = model(BaseQuant())
    assert warned(None, packed) == []  # a pipeline stage without losses, or slime without rollouts
    (said,) = warned(0.587, packed)
    assert "train_rollout_logprob_abs_diff is 0.587 at the first step, more than the 0.1" in said
    assert warned(0.587, packed) == []
    right = model(BaseQuant())
    assert warned(0.009, right) == [] and warned(0.587, right) == []
    assert warned(0.587, model(None)) == []


def test_an_adapter_of_a_4_bit_base_on_another(bases, tmp_path, caplog, monkeypatch):
    """--lora-adapter-path PEFT: what the adapter notes of its base is compared with the base that is here."""
    path, _ = bases(torch.bfloat16)
    adapter = to_peft(
        [Projection("model.layers.0.self_attn.q_proj", torch.ones(2, 192), torch.ones(256, 2), 1.0)], path
    )
    monkeypatch.setattr("slime_plugins.lora.ends.import_.import_peft", lambda model, path: None)
    for noted, here, warned in (
        (BaseQuant(), None, 1),
        (BaseQuant(), BaseQuant(), 0),
        (BaseQuant(), BaseQuant(double_quant=False), 1),
        (None, BaseQuant(), 0),
    ):
        write_adapter(tmp_path / "peft", *adapter, base=path, base_quant=noted)
        caplog.clear()
        model = torch.nn.Module()
        model.lora_base_quant = here
        checkpoints._start_from([model], str(tmp_path / "peft"))
        said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert len(said) == warned and all("trained on a base in 4 bits" in text for text in said)
