"""Adapters of models with experts on disk: PEFT directories in both forms, and checkpoints across EP, TP and ETP.

pytest tests/ends/test_experts_files.py
"""

from __future__ import annotations

import json
import warnings

import moe_models
import moe_reference
import moe_runs
import pytest
import torch
from moe_runs import ALPHA, RANK, SPLITS, TOKENS
from safetensors.torch import load_file

from slime_plugins.lora import LoRAConfig
from slime_plugins.lora.peft.verify import verify_adapter

FORMATS = ("per-expert", "fused")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    cache = {}

    def get(family):
        if family not in cache:
            cache[family] = moe_models.make_checkpoint(tmp_path_factory.mktemp(family), family)
        return cache[family]

    return get


def exported(pool, path, out, split, *, layout="split", targets=("all-linear",), moe_format="per-expert"):
    """Values that were put in, and the directory that came out."""
    values = moe_reference.values_of(path, RANK, layout)
    config = LoRAConfig(rank=RANK, alpha=ALPHA, layout=layout, target_modules=targets)
    pool.run(moe_runs.export, path, config, values, out, moe_format, **SPLITS[split])
    return values


def loaded_in_peft(path, adapter):
    """The model, and the keys that PEFT missed or did not expect."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    results = []
    load_adapter = PeftModel.load_adapter

    def noted(self, *args, **kwargs):
        results.append(load_adapter(self, *args, **kwargs))
        return results[-1]

    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("error", UserWarning)  # PEFT warns of keys it misses
        # Said of the pattern that PEFT itself writes when it stacks experts, and which it does apply.
        warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys did not match.*gate_up_proj")
        patch.setattr(PeftModel, "load_adapter", noted)
        model = PeftModel.from_pretrained(base, adapter)
    keys = [*results[0].unexpected_keys, *(key for key in results[0].missing_keys if "lora_" in key)]
    return model, keys


def merged_logits(path, values) -> torch.Tensor:
    """Of a base whose weights hold W + scaling B A, made with nothing but transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, (A, B) in values.items():
            delta = ALPHA / RANK * B @ A
            if ".mlp.experts." not in name:
                weights[f"{name}.weight"] += delta
                continue
            experts, number, leaf = name.rsplit(".", 2)
            if leaf == "down_proj":
                weights[f"{experts}.down_proj"][int(number)] += delta
            else:
                half = slice(0, len(delta)) if leaf == "gate_proj" else slice(len(delta), None)
                weights[f"{experts}.gate_up_proj"][int(number), half] += delta
        return model(TOKENS[:, :-1]).logits


def _forms():
    """Family, format, layout. All of them for two families; of the rest each format and each layout once."""
    for family in moe_models.FAMILIES:
        for moe_format in FORMATS:
            for layout in ("split", "fused"):
                # Gate and up with an A of their own in one stacked tensor is the form that is hard to write.
                first = family in ("qwen3_moe", "deepseek_v3") or (moe_format == "fused") == (layout == "split")
                yield pytest.param(family, moe_format, layout, marks=[] if first else [pytest.mark.slow])


@pytest.mark.parametrize("family, moe_format, layout", list(_forms()))
def test_peft_loads_the_export(te_pool4, checkpoints, tmp_path, family, moe_format, layout):
    """Whole, every key claimed, and the model that was trained; gate and up with an A of their own and with one."""
    path, out = checkpoints(family), tmp_path / "out"
    split = {"split": "tp2-ep2-etp2", "fused": "pp2-ep2"}[layout]
    values = exported(te_pool4, path, out, split, layout=layout, moe_format=moe_format)
    report = verify_adapter(out, path)
    assert report.ok, report.problems
    said = [
        "kv_b_proj" in warning.message for warning in report.warnings if warning.kind == "server"
    ]  # what vLLM never applies
    assert said == ([True] if family == "deepseek_v3" else []), report.warnings
    assert report.lora_A == report.lora_B == len(values)
    model, unclaimed = loaded_in_peft(path, out)
    assert not unclaimed
    with torch.no_grad():
        logits = model(TOKENS[:, :-1]).logits
    expected = merged_logits(path, values)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_per_expert_names(te_pool4, checkpoints, tmp_path):
    """Bit for bit what was put in, under the names of the base's own files, with one rank and no patterns."""
    path = checkpoints("deepseek_v3")
    values = exported(te_pool4, path, tmp_path / "a", "tp2-ep2-etp1")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(values)
    for name, (A, B) in values.items():
        assert torch.equal(tensors[f"base_model.model.{name}.lora_A.weight"], A)
        assert torch.equal(tensors[f"base_model.model.{name}.lora_B.weight"], B)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (RANK, ALPHA)
    assert not config.get("rank_pattern") and not config.get("use_rslora")
    # What SGLang makes buffers for (get_normalized_target_modules): the last piece of each name.
    assert {"gate_proj", "up_proj", "down_proj", "q_a_proj", "kv_b_proj"} <= {
        target.split(".")[-1] for target in config["target_modules"]
    }


def test_shared_experts_alone(te_pool4, checkpoints, tmp_path):
    """Routed experts without an adapter: names that leave them out."""
    path = checkpoints("qwen2_moe")
    exported(te_pool4, path, tmp_path / "a", "ep2", targets=("shared_experts.linear_fc1", "linear_qkv"))
    assert verify_adapter(tmp_path / "a", path).ok
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {key.split(".")[6] for key in tensors if ".mlp." in key} == {"shared_expert"}


@pytest.mark.parametrize("moe_format", FORMATS)
def test_import_at_another_split(te_pool4, checkpoints, tmp_path, moe_format):
    path = checkpoints("deepseek_v3")
    values = exported(te_pool4, path, tmp_path / "a", "tp2-ep2-etp2", moe_format=moe_format)
    for split in ("ep2", "tp2-etp1"):
        for error in te_pool4.run(moe_runs.imported, path, tmp_path / "a", values, **SPLITS[split]):
            assert error == 0.0


@pytest.mark.parametrize(
    "route",
    [
        ["tp2-etp1", "tp2-ep2-etp2", "ep2"],
        pytest.param(["tp2-etp1", "tp2-etp2", "tp1-etp2", "tp2-ep2-etp2", "pp2-ep2", "ep2"], marks=pytest.mark.slow),
    ],
    ids=len,
)
def test_checkpoint_across_splits(te_pool4, checkpoints, tmp_path, route):
    """EP 2 x TP 1 -> EP 1 x TP 2 -> back, weights and Adam's state: bit-equal, wherever they were in between."""
    path = checkpoints("qwen3_moe")
    values = moe_reference.values_of(path, RANK, "split")
    config = LoRAConfig(rank=RANK, alpha=ALPHA, layout="split")
    saved = te_pool4.run(moe_runs.save_trained, path, config, values, tmp_path / "0", **SPLITS["ep2"])
    expected = moe_runs.whole(saved)
    for i, split in enumerate(route):
        loaded = te_pool4.run(
            moe_runs.load_and_save, path, config, tmp_path / str(i), tmp_path / str(i + 1), **SPLITS[split]
        )
        seen = moe_runs.whole(loaded)
        assert seen.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(seen[key], tensor), f"{split}: {key}"


def test_experts_only(te_pool4, checkpoints, tmp_path):
    """No dense adapter, so an optimizer without dense parameters: it trains, saves and resumes."""
    path = checkpoints("qwen3_moe")
    values = moe_reference.values_of(path, RANK, "split")
    config = LoRAConfig(rank=RANK, alpha=ALPHA, layout="split", target_modules=("experts.linear_fc1",))
    saved = te_pool4.run(moe_runs.save_trained, path, config, values, tmp_path / "0", **SPLITS["ep2"])
    loaded = te_pool4.run(
        moe_runs.load_and_save, path, config, tmp_path / "0", tmp_path / "1", **SPLITS["tp2-ep2-etp2"]
    )
    expected, seen = moe_runs.whole(saved), moe_runs.whole(loaded)
    assert seen.keys() == expected.keys() and all(torch.equal(seen[key], tensor) for key, tensor in expected.items())
