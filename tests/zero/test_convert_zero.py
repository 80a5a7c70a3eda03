"""``convert-zero`` against DeepSpeed's own consolidation, on checkpoints that DeepSpeed made here, on the CPU.

Run: DS_BUILD_OPS=0 pip install '.[deepspeed]' && python -m pytest -m slow tests/zero/test_convert_zero.py
The file layout itself, faults and hostile files need no DeepSpeed: tests/zero/test_zero.py.
"""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slime_plugins.lora.cli import main
from slime_plugins.lora.peft.directory import read_adapter
from slime_plugins.lora.peft.verify import verify_adapter
from slime_plugins.lora.zero.files import ZeroCheckpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # DeepSpeed compiles its CPU communication once

pytest.importorskip("deepspeed", reason="needs DeepSpeed: DS_BUILD_OPS=0 pip install '.[deepspeed]'")
pytest.importorskip("peft")

CASES = (
    "1-bf16", "1-fp32", "2-bf16", "2-fp32", "3-bf16", "3-fp32",
    "3-bf16-lean", "2-bf16-lean", "2-bf16-head-groups", "3-fp32-head-groups",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Directory with one checkpoint per case, made by DeepSpeed on 2 processes."""
    out = tmp_path_factory.mktemp("zero")
    script = Path(__file__).with_name("make_zero.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    # A compiler is looked for beside Python (ninja).
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path}
    done = subprocess.run([*command, str(out), *CASES], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def consolidated(directory):
    """DeepSpeed's answer: name -> fp32 tensor of everything that was trained."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()):
        return get_fp32_state_dict_from_zero_checkpoint(str(directory), exclude_frozen_parameters=True)


@pytest.mark.parametrize("case", CASES)
def test_equal_to_deepspeeds_consolidation_bit_for_bit(made, tmp_path, case, capsys):
    theirs = consolidated(made / case)
    checkpoint = ZeroCheckpoint(made / case)
    assert set(checkpoint) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(checkpoint[name], tensor), name

    arguments = ["convert-zero", str(made / case), "--out", str(tmp_path / "out"), "--extra", str(tmp_path)]
    assert main(arguments) == 0
    config, found = read_adapter(tmp_path / "out")
    assert (config["r"], config["lora_alpha"]) == (5, 10)
    expected = {name.replace(".default", ""): tensor for name, tensor in theirs.items() if ".lora_" in name}
    assert set(found) == set(expected)
    assert len(expected) == 12
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    if "head" in case:
        score = theirs["base_model.model.score.modules_to_save.default.weight"]
        assert torch.equal(load_file(tmp_path / "extra.safetensors")["score.weight"], score)


@pytest.mark.parametrize("case", ["1-bf16", "2-fp32"])
def test_equal_to_the_adapter_that_peft_saved(made, tmp_path, case):
    """Stages 1 and 2 keep whole weights, so save_pretrained is right there: a second witness."""
    dtype = torch.bfloat16 if "bf16" in case else torch.float32
    assert main(["convert-zero", str(made / case), "--out", str(tmp_path / "out")]) == 0
    _, found = read_adapter(tmp_path / "out")
    saved = load_file(made / case / "adapter_model.safetensors")
    assert set(found) == set(saved)
    for key, tensor in saved.items():
        assert torch.equal(found[key].to(dtype), tensor.to(dtype)), key


@pytest.mark.parametrize("case", ["3-bf16", "3-fp32"])
def test_zero3_save_without_gathering_is_diagnosed_and_rescued(made, tmp_path, case):
    report = verify_adapter(made / case)
    assert not report.ok
    empty = [problem for problem in report.problems if problem.kind == "zero_size"]
    assert empty
    assert "run `slime-lora convert-zero CHECKPOINT_DIR --out DIR`" in empty[0].message
    assert main(["convert-zero", str(made / case), "--out", str(tmp_path / "out")]) == 0
    assert verify_adapter(tmp_path / "out").ok


def test_peft_loads_the_rescued_adapter(made, tmp_path):
    """Its logits are those of the consolidated weights loaded into the training-time model."""
    from make_zero import build
    from peft import PeftModel

    assert main(["convert-zero", str(made / "3-fp32"), "--out", str(tmp_path / "out")]) == 0
    trained = build(head=False, dtype=torch.float32)
    missing, unexpected = trained.load_state_dict(consolidated(made / "3-fp32"), strict=False)
    assert not unexpected
    assert not [name for name in missing if "lora" in name]
    loaded = PeftModel.from_pretrained(build(head=False, dtype=torch.float32).unload(), tmp_path / "out")
    ids = torch.arange(1, 15).reshape(2, 7)
    with torch.no_grad():
        assert torch.equal(trained.eval()(input_ids=ids).logits, loaded.eval()(input_ids=ids).logits)
