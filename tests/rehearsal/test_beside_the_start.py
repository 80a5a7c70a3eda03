"""What lies beside the adapter that a rehearsal starts from: heads, a reference policy; carried, or refused at once.

pytest tests/rehearsal/test_beside_the_start.py
"""

from __future__ import annotations

from types import SimpleNamespace

import adapter_dirs
import pytest
import torch

from slime_plugins.lora.config import LoRAConfig
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.peft.directory import write_adapter
from slime_plugins.lora.peft.extra import extra_of, put_extra
from slime_plugins.lora.rehearsal.adapter_start import carry_extra, kept_reference
from slime_plugins.lora.rehearsal.settings import resolve

HEAD = {"score.weight": torch.randn(3, 8)}


def settings(load=None, start=None, save=None):
    return SimpleNamespace(load=load, lora_adapter_path=start, save=save)


def test_from_an_adapter_into_adapter_and_run(tmp_path):
    write_adapter(tmp_path / "start", *adapter_dirs.adapter())
    put_extra(tmp_path / "start", HEAD)
    carried = carry_extra(settings(start=str(tmp_path / "start"), save=str(tmp_path / "run")), tmp_path / "adapter")
    assert carried == ["score.weight"]
    for place in ("adapter", "run"):
        assert torch.equal(extra_of(tmp_path / place)["score.weight"], HEAD["score.weight"])


def test_from_a_run_into_another(tmp_path):
    put_extra(tmp_path / "run", HEAD)
    (tmp_path / "run" / "iter_0000003").mkdir()
    (tmp_path / "run" / "iter_0000003" / "adapter.json").write_text("{}")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("3")
    assert carry_extra(settings(load=str(tmp_path / "run"), save=str(tmp_path / "next")), tmp_path / "adapter")
    assert torch.equal(extra_of(tmp_path / "next")["score.weight"], HEAD["score.weight"])


def test_a_run_from_the_base_takes_none_over_from_an_earlier_one(tmp_path):
    put_extra(tmp_path / "run", HEAD)
    assert carry_extra(settings(save=str(tmp_path / "run")), tmp_path / "adapter") == []
    assert extra_of(tmp_path / "run") == {}


def test_the_reference_that_a_run_has_kept(tmp_path):
    run = tmp_path / "run"
    (run / "iter_0000003").mkdir(parents=True)
    (run / "iter_0000003" / "adapter.json").write_text("{}")
    (run / "latest_checkpointed_iteration.txt").write_text("3")

    def kept(ref=None, load=None, save=None):
        return kept_reference(SimpleNamespace(lora_ref=ref, load=load, save=save))

    assert kept() is None and kept(load=str(run)) is None and kept("start", save=str(run)) is None
    with pytest.raises(UsageError, match="has kept no reference/; resume with --lora-ref base"):
        kept("start", load=str(run))
    (run / "reference").mkdir()
    assert kept("start", load=str(run)) == run / "reference"
    for ref in (None, "base"):
        with pytest.raises(UsageError, match="was trained with --lora-ref start, its reference policy is"):
            kept(ref, load=str(run))
        with pytest.raises(UsageError, match="holds the reference policy of another run"):
            kept(ref, save=str(run))


@pytest.mark.parametrize(
    "options, line",
    [
        (
            {"objective": "sft"},
            "--lora-ref start says what .*, and there is none with --objective sft",
        ),
        ({"kl_loss_coef": 0.0}, "and --kl-loss-coef 0; drop it"),
        ({}, "--lora-ref start without --lora-adapter-path"),
    ],
)
def test_a_reference_that_nothing_is_measured_from(options, line):
    with pytest.raises(UsageError, match=line):
        resolve({"lora_ref": "start", **options}, LoRAConfig()).check()
