"""Qwen3.5 as text and with an image, and Qwen3-Next, through slime's own train.py at tensor-parallel size 2.

See conftest.py for what to set. The interpreter needs a transformers that has Qwen3.5 (5.x); ``stand_ins/fla`` stands
for flash-linear-attention, ``newer_models.py`` makes the models.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from runs import LORA, Run, alone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
HERE = Path(__file__).parent
BOUNDS = {"qwen3_5": 0.004, "qwen3_5_vl": 0.004, "qwen3_next": 0.004}
"""Of slime's log-probs against transformers' in fp32 at step 0: bf16 noise is 0.001 to 0.002."""


@pytest.fixture(scope="module")
def start(harness_dir, megatron_dir, slime_python, patched_slime, tmp_path_factory):
    probe = "from transformers import Qwen3_5ForCausalLM"
    if subprocess.run([slime_python, "-c", probe], capture_output=True, check=False).returncode:
        pytest.skip("needs an interpreter whose transformers has Qwen3.5: set SLIME_PYTHON")

    def run(model: str, *words: str, extra: str = "") -> Run:
        work = tmp_path_factory.mktemp(model) / "work"
        command = [
            slime_python, HERE / "newer_models.py", harness_dir, "--slime", patched_slime, "--megatron", megatron_dir,
            "--work", work, "--pythonpath", HERE, "--pythonpath", HERE / "stand_ins", "--plugin", "probe",
            "--plugin", "served", "--model", model, "--tp", "2", "--steps", "2", *words,
            "--extra", f"{LORA} --save-hf hf_{{rollout_id}} {extra}",
        ]  # fmt: skip
        with alone():
            done = subprocess.run(list(map(str, command)), env=os.environ, capture_output=True, text=True, check=False)
        log = (work / "log.txt").read_text()
        assert done.returncode == 0, log[-4000:]
        return Run(work, log, json.loads((work / "steps.json").read_text())["steps"])

    return run


def check(run: Run, model: str) -> None:
    """It learns, from a reference that is the base, on log-probs that are transformers'."""
    assert len(run.steps) == 2
    assert run.of("train_rollout_logprob_abs_diff")[0] < BOUNDS[model]
    assert run.of("kl_loss")[0] == 0 and run.of("kl_loss")[1] > 0
    assert all(norm > 0 for norm in run.of("grad_norm"))
    assert run.of("lora/update_norm")[-1] > 0 and run.of("lora/dead")[-1] == 0
    bases = {(probe["rank"], probe["base"]) for probe in run.probes}
    assert len(bases) == len({rank for rank, _ in bases}), "the base has moved"


@pytest.mark.parametrize("model", ["qwen3_5", "qwen3_5_vl", "qwen3_next"])
def test_merged_weights_reach_the_engines(start, model):
    import torch
    from safetensors.torch import load_file

    run = start(model, "--mode", "colocate")
    check(run, model)
    if model == "qwen3_5_vl":
        assert "frozen: model.visual (" in run.log
    received = [load_file(file) for file in run.received("weights_*.safetensors")]
    base = load_file(run.work / "hf" / "model.safetensors")
    if model == "qwen3_5":  # whose tower is in the files, and not in the model
        base = {name: tensor for name, tensor in base.items() if ".visual." not in name}
    assert all(torch.equal(received[0][name], tensor) for name, tensor in base.items()), "B is zero at first"
    adapter = load_file(run.work / "hf_1" / "adapter_model.safetensors")
    moved = {name for name, tensor in base.items() if not torch.equal(received[-1][name], tensor)}
    modules = {key.removeprefix("base_model.model.").split(".lora_")[0] for key in adapter}
    assert moved == {f"{module}.weight" for module in modules}
    assert any(".linear_attn.in_proj_qkv" in name for name in moved)
    assert not any(".visual." in name for name in moved)
    for name in moved:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        A, B = (adapter[f"{module}.lora_{half}.weight"].float() for half in "AB")
        expected = (base[name].float() + 2.0 * (B @ A)).to(torch.bfloat16)
        assert torch.equal(received[-1][name], expected), name


@pytest.mark.parametrize("model", ["qwen3_5", "qwen3_5_vl"])
def test_adapters_reach_the_engines(start, model):
    """in_proj_qkv goes as three slices, and with in_proj_z; the rest is what is on disk."""
    import torch
    from safetensors.torch import load_file

    run = start(model, "--mode", "colocate", extra="--lora-sync adapter")
    check(run, model)
    disk = load_file(run.work / "hf_1" / "adapter_model.safetensors")
    sent = load_file(run.received("lora_*.safetensors")[-1])
    others = {key for key in disk if "in_proj" not in key}
    assert others < sent.keys() and all(torch.equal(sent[key], disk[key]) for key in others)
    slices = {key for key in sent if "in_proj" in key}
    assert {key.split(".in_proj_")[1][0] for key in slices} == set("qkvz") and len(slices) == 3 * 4 * 2
    for key in (key for key in disk if "in_proj_qkv.lora_B" in key):
        parts = [sent[key.replace("in_proj_qkv", f"in_proj_{leaf}")] for leaf in "qkv"]
        assert torch.equal(torch.cat(parts), disk[key])
    (started,) = {json.dumps(r["payload"]) for r in run.requests() if r["endpoint"] == "started"}
    assert {"in_proj_qkvz", "out_proj"} <= set(json.loads(started)["lora_target_modules"])


def test_adapter_sync_of_qwen3_next_is_refused_where_sglang_has_no_room(start):
    with pytest.raises(AssertionError, match=r"SGLang makes room for adapters of linear attention in Qwen3\.5 alone"):
        start("qwen3_next", "--mode", "colocate", extra="--lora-sync adapter --lora-target-modules in_proj_qkvz")
