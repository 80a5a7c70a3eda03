"""``--lora-ref start``: the adapter that training starts from as the reference, kept, resumed, at other sizes.

pytest tests/slime/hooks/test_slime_reference.py
"""

from __future__ import annotations

import shutil

import pytest
import slime_hooks_on_ranks as on_ranks
import torch
from harness import WorkerError
from tiny_checkpoints import tiny

PATH = {"lora_adapter_path": "the start"}


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    return tiny(tmp_path_factory)


@pytest.fixture(scope="module")
def started(pool2, hf_dir, tmp_path_factory):
    """A run at TP 2 from an adapter, saved after two steps."""
    work = tmp_path_factory.mktemp("start")
    args = {"lora_ref": "start", "save": str(work / "run"), **PATH}
    return work, pool2.run(on_ranks.reference, hf_dir, work, False, args, tp=2, sp=True)


def of_peft(hf_dir, adapter) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return PeftModel.from_pretrained(base, adapter)(on_ranks.tokens()[:, :-1]).logits


def test_the_reference_is_the_start_and_stays(started, hf_dir):
    work, results = started
    expected = of_peft(hf_dir, work / "adapter")
    for seen in results:
        assert (seen["ref"] - expected).abs().max() <= 1e-5 * expected.abs().max(), "transformers + PEFT"
        assert torch.equal(seen["ref after a step"], seen["ref"])
        assert not torch.allclose(seen["stepped"], seen["actor"], atol=1e-3)
        assert seen["bytes"]["ref"] == seen["bytes"]["actor"], "as large as an adapter"
    actor = torch.cat([seen["actor"] for seen in results], dim=-1)[..., :128]
    assert torch.equal(actor, results[0]["ref"]), "a KL of exactly 0 before the first step"
    assert (work / "run" / "reference" / "release" / "adapter.json").is_file()


@pytest.mark.parametrize("sizes", [{"tp": 2, "sp": True}, {"pp": 2}, {}], ids=["tp2", "pp2", "dp2"])
def test_resumed_it_is_the_same_at_any_size(pool2, started, hf_dir, tmp_path, sizes):
    """And lies in the new --save too, from which the next resume may read it."""
    work, before = started
    args = {"lora_ref": "start", "load": str(work / "run"), "save": str(tmp_path / "next"), **PATH}
    results = pool2.run(on_ranks.reference, hf_dir, work, True, args, **sizes)
    assert any(seen["actor"].numel() for seen in results)
    for rank, seen in enumerate(results):
        if not seen["actor"].numel():  # an earlier pipeline stage
            continue
        parts = before[0]["ref"].split(len(seen["ref"]))  # each data-parallel rank has its samples
        for name in ("ref", "ref after a step"):
            assert (seen[name] - parts[rank % len(parts)]).abs().max() <= 1e-5 * parts[0].abs().max()
    if "tp" in sizes:
        assert all(torch.equal(seen["actor"], old["stepped"]) for seen, old in zip(results, before, strict=True))
        assert torch.equal(results[0]["ref"], before[0]["ref"])
    assert (tmp_path / "next" / "reference" / "release" / "adapter.json").is_file()


def refused(pool, hf_dir, work, resumed, **args):
    with pytest.raises(WorkerError) as error:
        pool.run(on_ranks.reference, hf_dir, work, resumed, args, tp=2)
    kinds = {kind for kind, _ in error.value.errors.values()}
    assert kinds == {"ValueError"}
    return next(iter(error.value.errors.values()))[1]


def test_a_resume_is_told_what_the_reference_was(pool2, started, hf_dir, tmp_path):
    work, _ = started
    message = refused(pool2, hf_dir, work, True, load=str(work / "run"))
    assert "was trained with --lora-ref start" in message and "\n" not in message
    shutil.copytree(work / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "reference")
    message = refused(pool2, hf_dir, tmp_path, True, load=str(tmp_path / "run"), lora_ref="start")
    assert "has no reference/" in message and "\n" not in message
    message = refused(pool2, hf_dir, tmp_path, False, save=str(work / "run"), **PATH)
    assert "holds the reference policy of another run" in message
