"""The exported adapter in transformers + PEFT: nothing missing, nothing unexpected, the same logits. Hazards 1, 2, 11,
15, 16, 17.

    pytest tests/ends/test_export.py
"""

from __future__ import annotations

import json
import re

import adapted
import pytest
import reference
import torch
from harness import Layout, WorkerError
from safetensors.torch import load_file
from tiny_checkpoints import tiny

from slime_plugins.lora import LoRAConfig, export_peft
from slime_plugins.lora.adapters import iter_adapters

TOKENS = reference.batch(128)


def export(layout: Layout, hf_dir, out, config, spoil=None, base=None):
    """Random adapters, exported; returns this rank's logits, whole on the last stage."""
    chunks = adapted.adapted_chunks(hf_dir, config, sp=layout.sp, vpp=layout.vpp)
    adapted.randomize(chunks, scale=0.3)
    logits = adapted.run_schedule(
        chunks, TOKENS, microbatches=2 if layout.pp > 1 else 1, forward_only=True, collect_logits=True
    )
    logits = adapted.gather_logits(logits, 128)
    model = adapted.wrap(chunks)  # exporting reaches through DDP
    if spoil is not None:
        for linear in iter_adapters(model):
            if linear.lora.name == "decoder.layers.2.mlp.linear_fc1":
                linear.lora_B.data[0, 0] = spoil
    export_peft(model, out, hf_checkpoint=base or hf_dir)
    return logits


def load_in_peft(hf_dir, out):
    """The reader's side. PEFT says missing keys in a warning, so both lists are asked for."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(base, out)
    result = model.load_adapter(out, adapter_name="again")
    assert not result.unexpected_keys and not [key for key in result.missing_keys if "lora_" in key]
    model.set_adapter("default")
    return model


def check(pool, hf_dir, out, config, **sizes):
    results = pool.run(export, hf_dir, out, config, **sizes)
    logits = next(result for result in results if result is not None)
    with torch.no_grad():
        expected = load_in_peft(hf_dir, out)(TOKENS[:, :-1]).logits
    expected = expected[: len(logits)]  # with data parallelism, the first replica's samples
    assert adapted.relative(logits - expected, expected) <= 1e-5
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    return json.loads((out / "adapter_config.json").read_text()), load_file(out / "adapter_model.safetensors")


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("lora_layout", ["fused", "split"])
def test_families(pool2, tmp_path, tmp_path_factory, family, lora_layout):
    hf_dir = tiny(tmp_path_factory, family)
    config, tensors = check(
        pool2, hf_dir, tmp_path / "out", LoRAConfig(rank=4, alpha=6, layout=lora_layout), tp=2, sp=True
    )
    assert len(tensors) == 2 * 4 * len(reference.LEAVES)
    assert (config["r"], config["lora_alpha"]) == (4, 6)
    assert sorted(config["target_modules"]) == sorted(reference.LEAVES)
    assert config["base_model_name_or_path"] == str(hf_dir)
    assert not config.get("use_rslora") and not config.get("rank_pattern") and not config.get("alpha_pattern")
    assert all(
        re.fullmatch(r"base_model\.model\.model\.layers\.\d\.\w+\.\w+\.lora_[AB]\.weight", key) for key in tensors
    )


@pytest.mark.parametrize("sizes", [{"pp": 2}, {"pp": 2, "vpp": 2}, {"tp": 2}], ids=str)
def test_layer_numbers_are_global_at_every_parallelism(pool2, tmp_path, tmp_path_factory, sizes):
    """Hazard 15. The file is also the same, whatever the parallelism."""
    hf_dir = tiny(tmp_path_factory)
    _, tensors = check(pool2, hf_dir, tmp_path / "out", LoRAConfig(rank=3), **sizes)
    assert {key.split(".")[4] for key in tensors} == {"0", "1", "2", "3"}


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(rank=3, alpha=7, use_rslora=True),
        LoRAConfig(rank=3, alpha=7, alpha_pattern={"linear_fc2": 20, "v_proj": 1}),
        LoRAConfig(rank=3, alpha=7, layout="split", rank_pattern={"q_proj": 2, "up_proj": 5}, use_rslora=True),
        LoRAConfig(rank=3, target_modules=("q_proj", "v_proj")),
        LoRAConfig(rank=3, target_modules=("*.layers.[02].*.linear_qkv", "down_proj"), exclude_modules=("k_proj",)),
        LoRAConfig(rank=3, alpha=0.5, layout="split", target_modules=("up_proj", "o_proj"), dtype="bfloat16"),
    ],
    ids=["rslora", "alphas", "ranks", "q-v", "some-layers", "bf16-adapter"],
)
def test_one_rank_one_alpha_no_patterns(pool2, tmp_path, tmp_path_factory, config):
    """Scaling is baked in and ranks padded, for SGLang reads neither rsLoRA nor patterns (hazard 17)."""
    written, tensors = check(pool2, tiny(tmp_path_factory), tmp_path / "out", config, tp=2)
    assert not written.get("use_rslora") and not written.get("rank_pattern") and not written.get("alpha_pattern")
    assert isinstance(written["target_modules"], list)
    for key, tensor in tensors.items():
        assert tensor.shape[0 if "lora_A" in key else 1] == written["r"], key


def test_bf16_tensors_are_the_bits_of_the_model(pool1, tmp_path, tmp_path_factory):
    hf_dir, config = tiny(tmp_path_factory), LoRAConfig(rank=3, dtype="bfloat16")
    pool1.run(export, hf_dir, tmp_path / "out", config)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {
        torch.bfloat16
    }


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"pp": 2}], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused_on_every_rank(pool2, tmp_path, tmp_path_factory, value, sizes):
    """Hazard 11; what was there before stays whole."""
    hf_dir, out = tiny(tmp_path_factory), tmp_path / "out"
    pool2.run(export, hf_dir, out, LoRAConfig(rank=2), **sizes)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(WorkerError) as caught:
        pool2.run(export, hf_dir, out, LoRAConfig(rank=2), value, **sizes)
    assert set(caught.value.errors) == {0, 1}
    for kind, text in caught.value.errors.values():
        assert kind == "ValueError" and "model.layers.2.mlp.gate_proj.lora_B" in text and "not finite" in text
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def export_of_a_trained_base(layout: Layout, hf_dir, out):
    chunks = adapted.adapted_chunks(hf_dir, LoRAConfig(rank=2), freeze_base=False)
    adapted.randomize(chunks)
    export_peft(chunks, out, hf_checkpoint=hf_dir)


def test_an_adapter_without_its_trained_base_is_refused(pool2, tmp_path, tmp_path_factory):
    with pytest.raises(WorkerError) as caught:
        pool2.run(export_of_a_trained_base, tiny(tmp_path_factory), tmp_path / "out", pp=2)
    assert set(caught.value.errors) == {0, 1} and not (tmp_path / "out").exists()
    assert "is trainable): adapters alone would not hold all" in str(caught.value.errors)


def test_another_base_is_refused(pool2, tmp_path, tmp_path_factory):
    """The named checkpoint must be the base of the model; of adapters alone, modules and shapes: tests/peft."""
    from slime_plugins.lora.rehearsal.tiny import make_tiny

    other = make_tiny(tmp_path / "other", num_layers=4, hidden=32)
    with pytest.raises(
        WorkerError, match="other is not the base of this model: base hidden_size 32 in the checkpoint, 64 here"
    ):
        pool2.run(export, tiny(tmp_path_factory), tmp_path / "out", LoRAConfig(rank=2), None, other, tp=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("lora_layout", ["fused", "split"])
@pytest.mark.parametrize(
    "sizes", [{"tp": 2, "pp": 2, "sp": True}, {"tp": 2, "pp": 2}, {"tp": 2}, {"pp": 2, "vpp": 2}], ids=str
)
def test_four_processes(pool4, tmp_path, tmp_path_factory, family, lora_layout, sizes):
    check(pool4, tiny(tmp_path_factory, family), tmp_path / "out", LoRAConfig(rank=4, layout=lora_layout), **sizes)
