"""What was trained beside an adapter, in its own file or in PEFT's: read, written, verified, refused where it is lost.

pytest tests/peft/test_extra.py
"""

from __future__ import annotations

import json
import shutil

import adapter_dirs
import peft
import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoints import tiny
from transformers import AutoModelForCausalLM

from slime_plugins.lora.checkpoint.from_peft import import_checkpoint
from slime_plugins.lora.cli import main
from slime_plugins.lora.peft import extra
from slime_plugins.lora.peft.directory import write_adapter
from slime_plugins.lora.peft.read import PeftAdapter
from slime_plugins.lora.peft.verify import verify_adapter

HEAD = {"score.weight": torch.randn(3, 8), "encoder.0.bias": torch.arange(5, dtype=torch.bfloat16)}


def with_folder(directory, tensors=HEAD):
    write_adapter(directory, *adapter_dirs.adapter())
    extra.put_extra(directory, tensors)
    return directory


def as_peft(directory):
    """As PEFT saves an adapter with ``modules_to_save=["score"]``."""
    config, tensors = adapter_dirs.adapter()
    save = {**tensors, "base_model.model.score.weight": HEAD["score.weight"]}
    directory.mkdir()
    save_file(
        {key: value.contiguous().clone() for key, value in save.items()}, directory / "adapter_model.safetensors"
    )
    (directory / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["score"]}))
    return directory


def test_read_back_by_name_bit_for_bit(tmp_path):
    found = extra.extra_of(with_folder(tmp_path / "a"))
    assert set(found) == set(HEAD)
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in HEAD.items())
    (name,) = extra.extra_names(as_peft(tmp_path / "b"))
    assert name == "score.weight" and torch.equal(extra.extra_of(tmp_path / "b")[name], HEAD[name])
    assert extra.extra_of(tmp_path) == {}


def test_written_anew_it_is_the_new_one_alone(tmp_path):
    with_folder(tmp_path / "a")
    extra.put_extra(tmp_path / "a", {"other.weight": torch.ones(1)})
    assert extra.extra_names(tmp_path / "a") == ["other.weight"]
    extra.put_extra(tmp_path / "a", {})
    assert not (tmp_path / "a" / "extra").exists()


def test_verify_names_it_and_finds_what_is_wrong_with_it(tmp_path, capsys):
    report = verify_adapter(with_folder(tmp_path / "a"))
    assert report.ok and set(report.extra) == set(HEAD)
    assert main(["verify", str(tmp_path / "a")]) == 0
    assert "score.weight" in capsys.readouterr().out
    assert verify_adapter(as_peft(tmp_path / "b")).extra == ["score.weight"]

    file = tmp_path / "a" / "extra" / "extra.safetensors"
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 64
    file.write_bytes(whole)
    (problem,) = verify_adapter(tmp_path / "a").problems
    assert problem.kind == "checksum" and "checksum mismatch" in problem.message
    extra.put_extra(tmp_path / "a", {"score.weight": torch.tensor([float("nan")])})
    (problem,) = verify_adapter(tmp_path / "a").problems
    assert problem.kind == "not_finite" and problem.tensor == "score.weight"
    file.write_bytes(b"cut")
    (problem,) = verify_adapter(tmp_path / "a").problems
    assert problem.kind == "file" and "extra.safetensors" in problem.message


@pytest.mark.parametrize("make", [with_folder, as_peft])
def test_refused_by_name_where_it_would_be_lost(tmp_path, make):
    with pytest.raises(ValueError, match=r"whole modules were trained \(.*score\.weight"):
        PeftAdapter(make(tmp_path / "a"))
    assert "score.weight" in PeftAdapter(tmp_path / "a", carries=True).extra


def test_a_name_in_both_places_is_refused(tmp_path):
    extra.put_extra(as_peft(tmp_path / "a"), HEAD)
    with pytest.raises(ValueError, match=r"score\.weight is there twice"):
        extra.extra_of(tmp_path / "a")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny(tmp_path_factory)


def test_through_import_and_export_and_not_with_a_part_of_the_base(base, tmp_path, capsys):
    """PEFT's own file with a head in it -> a checkpoint -> an adapter: the head goes along, by name, bit for bit."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.score = torch.nn.Linear(model.config.hidden_size, 2, bias=False)
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], modules_to_save=["score"], init_lora_weights=False
    )
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path / "theirs")
    head = wrapped.base_model.model.score.modules_to_save["default"].weight.detach()

    import_checkpoint(tmp_path / "theirs", base, tmp_path / "run")
    assert torch.equal(extra.extra_of(tmp_path / "run")["score.weight"], head)
    words = ["export", "--checkpoint", tmp_path / "run", "--hf-checkpoint", base, "--out", tmp_path / "ours"]
    assert main(list(map(str, words))) == 0
    assert "also trained, beside the adapter: score.weight" in capsys.readouterr().out
    assert torch.equal(extra.extra_of(tmp_path / "ours")["score.weight"], head)
    assert verify_adapter(tmp_path / "ours", base).ok

    shutil.rmtree(tmp_path / "run")
    assert main(["import", "--adapter", str(tmp_path / "ours"), "--hf-checkpoint", str(base), "--out",
                 str(tmp_path / "run")]) == 0  # fmt: skip
    assert torch.equal(extra.extra_of(tmp_path / "run")["score.weight"], head)
    extra.put_extra(tmp_path / "ours", {"lm_head.weight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"lm_head\.weight was trained beside the adapter and is part of the base"):
        import_checkpoint(tmp_path / "ours", base, tmp_path / "run2")
