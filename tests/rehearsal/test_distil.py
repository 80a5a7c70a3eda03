"""``slime-lora rehearse --objective gkd`` from the command line: a teacher is reached without any reward, or refused.

pytest tests/rehearsal/test_distil.py            # two steps
pytest tests/rehearsal/test_distil.py -m slow    # the whole default run, a minute or two
"""

from __future__ import annotations

import json

import pytest
from rehearsals import Rehearsal
from safetensors.torch import load_file

from slime_plugins.lora.cli import main
from slime_plugins.lora.objectives.divergence import STATISTICS

SHORT = ["--objective", "gkd", "--steps", "4", "--rollout-batch-size", "8"]


def read(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return json.loads((out / "summary.json").read_text()), [json.loads(line) for line in lines]


def test_outputs(cache, tmp_path):
    """With an average for a teacher, which is written as the student is, and answers with its own prompt."""
    out = tmp_path / "run"
    with Rehearsal(out, cache, *SHORT, "--sp", "--seed", "1", "--gkd-teacher", "ema", "--gkd-ema-decay", "0.5") as run:
        code, log = run.wait()
        assert code == 0, log
        assert not run.orphans()
    summary, steps = read(out)
    assert all(set(STATISTICS) <= step.keys() for step in steps)
    assert all(step["loss"] == step["divergence"] > 0 for step in steps)
    assert {step["on_policy"] for step in steps} == {0.0, 1.0}
    assert summary["on_policy_share"] == sum(step["on_policy"] for step in steps) / 4
    assert all(("reward" in step) == bool(step["on_policy"]) for step in steps)
    assert "steps_without_signal" not in summary, "nothing is learnt from rewards"
    assert "nothing to learn from" not in log
    assert 0 < summary["student_reward"] < 0.5 < summary["teacher_reward"] < 1
    assert f"student {summary['student_reward']:.3f}, teacher {summary['teacher_reward']:.3f}" in log
    student, teacher = (load_file(out / name / "adapter_model.safetensors") for name in ("adapter", "teacher"))
    assert student.keys() == teacher.keys()
    assert any((student[name] != teacher[name]).any() for name in student)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_teacher_that_is_the_student_is_refused(tmp_path, capsys):
    """With the built-in task's own context taken away: one line, at once, and nothing is started."""
    flags = ["--gkd-teacher-prompt-template", "{prompt}", "--out", str(tmp_path / "out")]
    assert main(["rehearse", *SHORT, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("slime-lora: error: --gkd-teacher base: the adapters start as nothing (B = 0)")
    assert "divergence and gradient are exactly 0 and nothing can be learnt" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--tp", "2", "--sp"]], ids=["tp2", "tp2-sp"])
def test_the_student_reaches_its_teacher(cache, tmp_path, flags):
    """The base teaches itself: shown the answer it gives it in three of four cases; no reward is trained on."""
    out = tmp_path / "run"
    with Rehearsal(out, cache, "--objective", "gkd", *flags) as run:
        code, log = run.wait(timeout=290)
        assert code == 0, log
    summary, steps = read(out)
    assert summary["base_reward"] < 0.25
    assert summary["teacher_reward"] > 0.7
    assert abs(summary["student_reward"] - summary["teacher_reward"]) <= 0.03
    assert steps[-1]["divergence"] < steps[0]["divergence"] / 8
