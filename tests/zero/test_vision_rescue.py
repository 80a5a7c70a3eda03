"""A vision and language LoRA of 828 tensors out of ZeRO-3: what is rescued acts, on every loader that can take it.

Run: DS_BUILD_OPS=0 pip install '.[deepspeed]' && python -m pytest -m slow tests/zero/test_vision_rescue.py
"""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import families
import pytest
import torch
from safetensors.torch import load_file

from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.cli import main
from slime_plugins.lora.peft.verify import verify_adapter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

pytest.importorskip("deepspeed", reason="needs DeepSpeed: DS_BUILD_OPS=0 pip install '.[deepspeed]'")
pytest.importorskip("peft")

LAYERS, BLOCKS, RANK, SCALING = 36, 32, 128, 2.0
IMAGE, START = 60, 62


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The base, and what DeepSpeed's run left."""
    root = tmp_path_factory.mktemp("vision")
    base = families.make(root / "base", "qwen2_5_vl", text=dict(num_hidden_layers=LAYERS), vision=dict(depth=BLOCKS))
    script = Path(__file__).with_name("make_vision_zero.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path}
    done = subprocess.run(
        [*command, str(base), str(root / "run")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return base, root / "run"


def consolidated(run):
    """DeepSpeed's own answer."""
    import contextlib
    import io

    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()):
        return get_fp32_state_dict_from_zero_checkpoint(str(run), exclude_frozen_parameters=True)


def logits(model):
    generator = torch.Generator().manual_seed(5)
    tokens = torch.tensor([[3, START, IMAGE, IMAGE, IMAGE, IMAGE, 9, 4, 33, 17]])
    with torch.no_grad():
        return model(
            input_ids=tokens,
            pixel_values=torch.randn(16, 96, generator=generator),
            image_grid_thw=torch.tensor([[1, 4, 4]]),
            mm_token_type_ids=(tokens == IMAGE).int(),
        ).logits


def test_828_tensors_act(made, tmp_path, capsys):
    from peft import PeftModel

    base, run = made
    theirs = consolidated(run)
    assert len(theirs) == 828 and all(name.startswith("base_model.base_model.model.") for name in theirs)
    empty = load_file(run / "adapter_model.safetensors")
    assert all(tensor.numel() == 0 for tensor in empty.values()), "this is what the user has"
    out = tmp_path / "adapter"
    assert main(["convert-zero", str(run), "--base-model", str(base), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "PeftModel.from_pretrained: takes all" in printed and "load_adapter: takes all" in printed
    tensors = load_file(out / "adapter_model.safetensors")
    assert len(tensors) == 828 and {tuple(t.shape).index(RANK) for k, t in tensors.items() if "lora_A" in k} == {0}
    report = verify_adapter(out, base)
    assert report.ok and report.names == "module" and report.expected_modules == 414
    said = " ".join(warning.message for warning in report.warnings)
    assert "vLLM leaves out 162 of 414" in said
    assert "SGLang refuses the adapter for 66 of 414" in said, (
        "attn.qkv, attn.proj and the merger are no targets of it"
    )
    assert "SGLang leaves out 96 of 414" in said

    model = families.load(base, "qwen2_5_vl")
    before, parameters, checkpoint = logits(model), dict(model.named_parameters()), BaseCheckpoint(base)
    with torch.no_grad():
        for name, A in theirs.items():
            if ".lora_A." in name:
                module = checkpoint.module(name.removeprefix("base_model.base_model.model.").split(".lora_A")[0])
                B = theirs[name.replace(".lora_A.", ".lora_B.")]
                parameters[f"{module}.weight"].add_(SCALING * (B.float() @ A.float()))
    expected = logits(model)
    assert (expected - before).abs().max() > 0.01
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        peft = PeftModel.from_pretrained(families.load(base, "qwen2_5_vl"), out)
    assert sum(".lora_A." in name for name, _ in peft.named_parameters()) == 414
    other = families.load(base, "qwen2_5_vl")
    result = other.load_adapter(str(out))
    assert not result.missing_keys and not result.unexpected_keys
    largest = expected.abs().max()
    for found in (logits(peft), logits(other)):
        assert (found - expected).abs().max() <= 1e-5 * largest

    # Under the names of the run, which are what a rescue that does not know the base writes, PEFT changes nothing.
    old = tmp_path / "old"
    assert main(["convert-zero", str(run), "--out", str(old)]) == 0
    assert verify_adapter(old, base).problems[0].kind == "names"
    with pytest.warns(UserWarning, match="Found missing adapter keys"):
        dead = PeftModel.from_pretrained(families.load(base, "qwen2_5_vl"), old)
    assert torch.equal(logits(dead), before)


def test_checkpoint_names_on_request(made, tmp_path):
    base, run = made
    out = tmp_path / "adapter"
    command = ["convert-zero", str(run), "--base-model", str(base), "--out", str(out), "--names", "checkpoint"]
    assert main(command) == 0
    keys = load_file(out / "adapter_model.safetensors")
    assert f"base_model.model.model.layers.{LAYERS - 1}.mlp.up_proj.lora_A.weight" in keys
    assert f"base_model.model.visual.blocks.{BLOCKS - 1}.attn.qkv.lora_B.weight" in keys
    report = verify_adapter(out, base, names="checkpoint")
    assert report.ok and report.loaders["PeftModel.from_pretrained"].startswith("leaves out 414 of 414")
    assert report.loaders["load_adapter"] == "takes all"
    with pytest.raises(SystemExit) as text:
        raise SystemExit(main([*command[:-1], "text", "--force"]))
    assert text.value.code == 2, "a tower has no name in the text model"
