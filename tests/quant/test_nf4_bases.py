"""Which directories are the base of a 4-bit model: what it was made of, and what ``dequantize`` made of that.

pytest tests/quant/test_nf4_bases.py
"""

from __future__ import annotations

import json
import shutil

import adapted
import nf4_oracle
import nf4_runs
import pytest
import torch
from harness import Layout
from safetensors.torch import load_file, save_file

from slime_plugins.lora import BaseQuant, export_peft, import_peft
from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.base.fingerprint import fingerprint_of_hf
from slime_plugins.lora.checkpoint.model import fingerprint_of_model
from slime_plugins.lora.cli import main
from slime_plugins.lora.cli.verify import table
from slime_plugins.lora.peft.directory import AdapterTensors
from slime_plugins.lora.peft.verify import verify_adapter


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The checkpoint, what the verb makes of it, and copies of both with another value in a matrix or a norm."""
    path, work = nf4_oracle.checkpoint(tmp_path_factory, dtype=torch.bfloat16), tmp_path_factory.mktemp("bases")
    assert main(["dequantize", "--hf-checkpoint", str(path), "--out", str(work / "dense")]) == 0
    changed = {"matrix": "model.layers.1.mlp.up_proj.weight", "norm": "model.layers.0.input_layernorm.weight"}
    for source in (path, work / "dense"):
        kind = "dense" if source.name == "dense" else "source"
        for part, name in changed.items():
            shutil.copytree(source, work / f"{kind}-{part}")
            file = work / f"{kind}-{part}" / "model.safetensors"
            tensors = load_file(file)
            tensors[name].view(-1)[3] += 1
            save_file(tensors, file, {"format": "pt"})
    shutil.copytree(work / "dense", work / "dense-noted-nowhere")
    (work / "dense-noted-nowhere" / "slime_lora_base.json").unlink()
    shutil.copytree(path, work / "source-fp8")
    config = json.loads((path / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (work / "source-fp8" / "config.json").write_text(json.dumps(config))
    return path, work


def ends(layout: Layout, hf_dir, work, out):
    """What export, import and the check of the engines' base say of every directory: "" or the error."""
    from slime_plugins.lora.slime.hooks.base_check import refuse_other_base, remember_base

    chunks, _ = nf4_runs.chunks_of(layout, hf_dir, dtype=torch.bfloat16)
    adapted.randomize(chunks)
    remember_base(chunks, str(hf_dir), None)
    said = {"fingerprint": fingerprint_of_model(chunks)}
    directories = {"source": hf_dir, "dense": work / "dense"}
    directories |= {path.name: path for path in work.iterdir() if "-" in path.name}
    for kind, directory in directories.items():
        said[f"export {kind}"] = _raised(export_peft, chunks, out / kind, hf_checkpoint=directory)
        said[f"engines {kind}"] = _raised(refuse_other_base, chunks, str(directory))
    for kind in ("source", "dense"):
        said[f"import {kind}"] = _raised(import_peft, chunks, out / kind)
    other, _ = nf4_runs.chunks_of(layout, work / "source-matrix", dtype=torch.bfloat16)
    for kind in ("source", "dense"):
        said[f"other {kind}"] = _raised(import_peft, other, out / kind)
    return said


def _raised(fn, *args, **kwargs) -> str:
    try:
        fn(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return ""


def test_the_right_base_and_no_other(pool2, bases, tmp_path):
    path, work = bases
    for said in pool2.run(ends, path, work, tmp_path, tp=2):
        fingerprint = said.pop("fingerprint")
        assert fingerprint.pop("quantization") == BaseQuant().to_dict()
        assert fingerprint == fingerprint_of_hf(BaseCheckpoint(path), "bfloat16", range(2))
        assert {key for key, error in said.items() if not error} == {
            *("export source", "export dense", "export dense-noted-nowhere", "import source", "import dense"),
            *("engines dense", "engines dense-noted-nowhere"),
        }
        for end in ("export", "engines"):
            assert "its weights are stored as fp8, which no 4-bit base is made of" in said[f"{end} source-fp8"]
        assert "base weights differ in 1 of 2 layers compared, from layer 1" in said["export source-matrix"]
        assert "base weights differ in 1 of 2 layers compared, from layer 1" in said["export dense-matrix"]
        assert "norms or biases of the base differ in 1 layers, from layer 0" in said["export source-norm"]
        assert "norms or biases of the base differ in 1 layers, from layer 0" in said["engines dense-norm"]
        assert "`slime-lora dequantize`" in said["engines source"]
        assert "not for this base: base weights differ in 1 of 2" in said["other source"]
        assert "not for this base: base weights differ in 1 of 2" in said["other dense"]
    assert AdapterTensors(tmp_path / "source" / "adapter_model.safetensors").base_quant == BaseQuant()
    for kind in ("dense", "dense-noted-nowhere"):  # there it lies on dense weights
        assert AdapterTensors(tmp_path / kind / "adapter_model.safetensors").base_quant is None
    assert "nf4 while it was trained" in table(verify_adapter(tmp_path / "source", path))
