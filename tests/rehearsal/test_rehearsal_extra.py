"""What was trained beside the adapter that a rehearsal starts from: carried, or refused before a process starts.

pytest tests/rehearsal/test_rehearsal_extra.py
"""

from __future__ import annotations

from types import SimpleNamespace

import adapter_dirs
import torch

from slime_plugins.lora.peft.directory import write_adapter
from slime_plugins.lora.peft.extra import extra_of, put_extra
from slime_plugins.lora.rehearsal.adapter_start import carry_extra

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
