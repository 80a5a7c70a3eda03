"""Bases that see images, whose modules have other names than their files: an export acts, whoever loads it.

Run: python -m pytest tests/peft/test_vision_names.py
"""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.base.merge import merge_checkpoint
from slime_plugins.lora.peft.directory import write_adapter
from slime_plugins.lora.peft.form import to_peft
from slime_plugins.lora.peft.read import PeftAdapter
from slime_plugins.lora.peft.verify import verify_adapter
from slime_plugins.lora.projections import Projection

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
TOKENS = torch.tensor([[3, 5, 7, 11, 2, 9]])


def tiny_model(family: str):
    """Two layers and a vision tower of one block, with random weights."""
    import transformers

    torch.manual_seed(0)
    text = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    if family == "llava":
        vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
        vision |= dict(image_size=16, patch_size=4, model_type="clip_vision_model")
        text |= dict(model_type="llama", head_dim=8)
        config = transformers.LlavaConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
        return transformers.LlavaForConditionalGeneration(config)
    text["rope_scaling"] = {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"}
    vision = dict(depth=1, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)
    if family == "qwen2_5_vl":
        vision |= dict(
            hidden_size=16, intermediate_size=24, out_hidden_size=32, window_size=16, fullatt_block_indexes=[0]
        )
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
        return transformers.Qwen2_5_VLForConditionalGeneration(config)
    vision |= dict(embed_dim=16, hidden_size=32, mlp_ratio=2)
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return transformers.Qwen2VLForConditionalGeneration(config)


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen2_vl", "llava"])
def vision_base(request, tmp_path_factory):
    """Directory of a checkpoint as the hub has them: ``model.layers`` and ``visual.blocks``, for one, in its files."""
    path = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param).save_pretrained(path)
    names = BaseCheckpoint(path).linears
    text, tower = ("language_model.model.", "vision_tower.") if request.param == "llava" else ("model.", "visual.")
    assert f"{text}layers.1.mlp.up_proj" in names and any(name.startswith(tower) for name in names)
    return path


def load(directory):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def projections(base: BaseCheckpoint, leaves) -> list[Projection]:
    """A trained adapter of rank 4 on these linears of both layers."""
    generator, found = torch.Generator().manual_seed(1), []
    for name in (f"model.layers.{layer}.{leaf}" for layer in range(2) for leaf in leaves):
        rows, columns = base.linear_shape(base.spelled(name))
        A = torch.randn(4, columns, generator=generator) * 0.3
        found.append(Projection(name=name, A=A, B=torch.randn(rows, 4, generator=generator) * 0.3, scaling=2.0))
    return found


def peft_logits(base_dir, adapter_dir) -> torch.Tensor:
    """Through ``PeftModel.from_pretrained``, which only warns of what it does not find."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        model = PeftModel.from_pretrained(load(base_dir), adapter_dir)
    # As many as there are in the file, and none of them missing: so none was unexpected.
    assert sum(".lora_A." in name for name, _ in model.named_parameters()) == len(adapted(adapter_dir))
    return logits(model)


def loaded_logits(base_dir, adapter_dir) -> torch.Tensor:
    """Through transformers' ``load_adapter``."""
    model = load(base_dir)
    model.load_adapter(str(adapter_dir))
    assert sum(".lora_A." in name for name, _ in model.named_parameters()) == len(adapted(adapter_dir))
    return logits(model)


def adapted(adapter_dir) -> list[str]:
    return [k for k in load_file(adapter_dir / "adapter_model.safetensors") if ".lora_A." in k]


@pytest.mark.parametrize("leaves", [ATTENTION, ATTENTION + MLP], ids=["attention", "all"])
def test_an_export_acts_under_both_loaders(vision_base, leaves, tmp_path):
    base = BaseCheckpoint(vision_base)
    config, tensors = to_peft(projections(base, leaves), base)
    assert all(key.startswith(f"base_model.model.{base.module(base.layer_prefix)}") for key in tensors)
    assert config["target_modules"] == sorted(leaf.partition(".")[2] for leaf in leaves)
    out = tmp_path / "adapter"
    write_adapter(out, config, tensors, base=base)
    merge_checkpoint(projections(base, leaves), base, tmp_path / "merged")
    expected, before = logits(load(tmp_path / "merged")), logits(load(vision_base))
    assert (expected - before).abs().max() > 0.1
    for of_loader in (peft_logits, loaded_logits):
        torch.testing.assert_close(of_loader(vision_base, out), expected, atol=1e-5, rtol=1e-5)
    report = verify_adapter(out, vision_base, full=True)
    assert report.ok and report.warnings == [], report
    assert report.expected_modules == 2 * len(leaves)


def test_the_tower_is_excluded_where_it_has_such_leaves(vision_base):
    base = BaseCheckpoint(vision_base)
    found = [to_peft(projections(base, leaves), base)[0].get("exclude_modules") for leaves in (ATTENTION, MLP)]
    visual, tower = r"(model\.)?(visual)\..*", r"(model\.)?(vision_tower)\..*"
    expected = {"qwen2_5_vl": [None, visual], "qwen2_vl": [None, None], "llava": [tower, None]}
    assert found == expected[base.config["model_type"]]


def old_names(base, adapter_dir, out):
    """The same adapter under the names of the base's files, as exports had them."""
    out.mkdir()
    loaded, stored = base.module(base.layer_prefix), base.layer_prefix
    tensors = load_file(adapter_dir / "adapter_model.safetensors")
    save_file({k.replace(loaded, stored): v for k, v in tensors.items()}, out / "adapter_model.safetensors")
    config = json.loads((adapter_dir / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


def test_the_names_of_the_files_are_a_problem(vision_base, tmp_path):
    base = BaseCheckpoint(vision_base)
    write_adapter(tmp_path / "adapter", *to_peft(projections(base, ATTENTION), base), base=base)
    old = old_names(base, tmp_path / "adapter", tmp_path / "old")
    report = verify_adapter(old, vision_base)
    if base.config["model_type"] == "llava":  # PEFT itself knows how its files are read
        assert report.ok
        return
    (problem,) = report.problems
    assert problem.kind == "names" and "\n" not in problem.message
    assert "8 modules are named as in the files" in problem.message
    assert "PEFT would load the adapter without an error and change nothing" in problem.message
    # That is so.
    from peft import PeftModel

    with pytest.warns(UserWarning, match="Found missing adapter keys"):
        dead = logits(PeftModel.from_pretrained(load(vision_base), old))
    assert torch.equal(dead, logits(load(vision_base)))


def test_both_spellings_are_read(vision_base, tmp_path):
    base = BaseCheckpoint(vision_base)
    write_adapter(tmp_path / "adapter", *to_peft(projections(base, ATTENTION), base), base=base)
    old = old_names(base, tmp_path / "adapter", tmp_path / "old")
    for directory in (tmp_path / "adapter", old):
        adapter = PeftAdapter(directory, base)
        assert {adapter.canonical(m) for m in adapter.modules} == {p.name for p in projections(base, ATTENTION)}
        assert set(adapter.linears()) == {
            f"decoder.layers.{i}.self_attention.{leaf}" for i in (0, 1) for leaf in ("linear_qkv", "linear_proj")
        }


def test_another_base_is_still_another_base(vision_base, tmp_path):
    base = BaseCheckpoint(vision_base)
    config, tensors = copy.deepcopy(to_peft(projections(base, ATTENTION), base))
    tensors = {key.replace("language_model", "other"): value for key, value in tensors.items()}
    write_adapter(tmp_path / "adapter", config, tensors)
    assert "the adapter is for another base" in str(verify_adapter(tmp_path / "adapter", vision_base).problems[0])
