"""Validation, learning rate on a plateau, stopping, best and final adapter, in whole rehearsals.

pytest tests/rehearsal/test_control.py            # two short runs, half a minute
pytest tests/rehearsal/test_control.py -m slow    # rewards, a cooldown, layouts, starts from an adapter
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from rehearsals import Rehearsal
from safetensors.torch import load_file

from slime_plugins.lora.checkpoint import directory
from slime_plugins.lora.checkpoint.manifest import Manifest
from slime_plugins.lora.cli import main
from slime_plugins.lora.control.history import FILE, load

SFT = ("--objective", "sft", "--tp", "1", "--rollout-batch-size", "32", "--lora-plus-ratio", "4")
# Nothing is better by 90 %: every validation but the first is idle.
PLATEAU = ("--val-interval", "1", "--lr-plateau-metric", "val_loss", "--lr-plateau-threshold", "0.9")


def rehearse(out: Path, cache: Path, *flags: str) -> str:
    with Rehearsal(out, cache, *map(str, flags)) as run:
        code, log = run.wait()
        assert code == 0, log
        assert not run.orphans()
    return log


def rates(out: Path) -> list[float]:
    return [json.loads(line)["lr"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def step_of(save: Path) -> int | None:
    return Manifest.read(directory.find(save)).step


@pytest.fixture(scope="module")
def stopped(cache, tmp_path_factory):
    """The rate is halved after steps 3 and 5, and below the lowest then."""
    root = tmp_path_factory.mktemp("stopped")
    flags = ("--steps", 9, "--save", root / "save", "--save-interval", 2, "--stop-min-lr", 2e-3, *PLATEAU)
    return root, rehearse(root / "out", cache, *SFT, *flags), flags


def test_a_plateau_lowers_the_rate_and_stops_the_run(stopped):
    root, log, _ = stopped
    assert rates(root / "out") == [5e-3, 5e-3, 5e-3, 2.5e-3, 2.5e-3]
    assert "stop: the learning rate 0.00125 is below --stop-min-lr 0.002" in log
    assert step_of(root / "save") == 5, "saved, though no interval ended there and four steps were left"
    summary = json.loads((root / "out" / "summary.json").read_text())
    assert (summary["last_step"], summary["lr_last"]) == (5, 1.25e-3) and "0.00125" in summary["stopped"]
    past = load(root / "save" / FILE)
    assert [entry.step for entry in past.entries] == [1, 2, 3, 4, 5] and past.stopped_at == 5
    assert {p.name for p in (root / "save").iterdir()} >= {"best", "final", FILE, "iter_0000005"}


def adapter(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter_model.safetensors")


def test_validation_loss_and_best_adapter_are_those_of_transformers(stopped, cache):
    """Mean of -log p over all response tokens, end tokens too, of the built-in held-out pairs under best/."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from slime_plugins.lora.rehearsal.preflight import validation_prompts
    from slime_plugins.lora.rehearsal.settings import Settings

    root, _, _ = stopped
    settings = json.loads((root / "out" / "settings.json").read_text())
    base = settings["hf_checkpoint"]
    prompts = validation_prompts(Settings(hf_checkpoint=base, prompt_data=settings["prompt_data"], val_interval=1))
    assert len(prompts) > 200 and prompts[0].response == prompts[0].label
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), root / "save" / "best"
    )
    nll, tokens = 0.0, 0
    for prompt in prompts:
        given = tokenizer(prompt.prompt).input_ids
        wanted = [*tokenizer(prompt.response, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            log_probs = model(torch.tensor([given + wanted])).logits[0].log_softmax(-1)
        rows = log_probs[len(given) - 1 : -1]
        nll -= rows[torch.arange(len(wanted)), torch.tensor(wanted)].double().sum().item()
        tokens += len(wanted)
    past = load(root / "save" / FILE)
    assert past.state.best == pytest.approx(nll / tokens, rel=1e-5)
    assert past.state.best == min(entry.metrics["val_loss"] for entry in past.entries)
    final, exported = adapter(root / "save" / "final"), adapter(root / "out" / "adapter")
    assert all(torch.equal(final[name], exported[name]) for name in exported)


def test_a_stopped_run_does_not_start_again(stopped, cache):
    root, _, flags = stopped
    before = times(root)
    log = rehearse(root / "out", cache, *SFT, *flags, "--load", root / "save")
    assert "this run has stopped, after step 5" in log and "nothing is done" in log and "starting" not in log
    assert times(root) == before, "results stay as they were"


def times(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.suffix != ".log"}


def test_a_resume_inside_a_patience_window_decides_as_the_run_that_went_on(stopped, cache, tmp_path):
    """Steps 2 and 3 are idle, and 3 lowers; the resume comes between them. It stops too; the best comes along."""
    root, _, flags = stopped
    flags = [tmp_path / "save" if word == root / "save" else word for word in flags]
    log = rehearse(tmp_path / "out", cache, *SFT, *flags, "--load", root / "save" / "iter_0000002")
    assert rates(tmp_path / "out") == rates(root / "out")[2:] and "stop: the learning rate 0.00125" in log
    assert_same_end(tmp_path / "save", root / "save")


def assert_same_end(one: Path, other: Path) -> None:
    """History, best and final adapter, bit for bit."""
    assert (one / FILE).read_text() == (other / FILE).read_text()
    for name in ("best", "final"):
        here, there = adapter(one / name), adapter(other / name)
        assert here.keys() == there.keys() and all(torch.equal(here[key], there[key]) for key in there), name


@pytest.mark.slow
def test_a_resume_inside_a_patience_window_with_a_cooldown_behind_it(cache, tmp_path):
    """Patience 2: idle at 2, 3, (4) lowers; the resume comes after step 3. The best adapter comes along."""
    flags = (*SFT, *PLATEAU, "--lr-plateau-patience", "2", "--lr-plateau-cooldown", "1", "--save-interval", "3")
    rehearse(tmp_path / "whole", cache, *flags, "--steps", "7", "--save", tmp_path / "a")
    rehearse(
        tmp_path / "half", cache, *flags, "--steps", "7", "--save", tmp_path / "b",
        "--load", tmp_path / "a" / "iter_0000003",
    )  # fmt: skip
    assert rates(tmp_path / "whole") == [5e-3] * 4 + [2.5e-3] * 3
    assert rates(tmp_path / "half") == rates(tmp_path / "whole")[3:]
    assert_same_end(tmp_path / "b", tmp_path / "a")


@pytest.mark.slow
def test_rewards_higher_is_better(cache, tmp_path):
    flags = ("--tp", "1", "--steps", "4", "--rollout-batch-size", "8", "--n-samples-per-prompt", "4")
    plateau = ("--eval-interval", "1", "--lr-plateau-metric", "eval/reward", "--lr-plateau-threshold", "0.9")
    log = rehearse(tmp_path / "out", cache, *flags, *plateau, "--lr-plateau-patience", "0", "--stop-metric", "0.99")
    past = load(tmp_path / "out" / FILE)
    rewards = [entry.metrics["eval/reward"] for entry in past.entries]
    assert past.rule.greater_is_better and past.state.best == max(rewards) and len(rewards) == 4
    assert past.state.lr < 5e-3 and "learning rate 0.005 -> 0.0025" in log
    assert (tmp_path / "out" / "best").is_dir() and not past.state.stopped


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [("--tp", "1", "--pp", "2"), ("--tp", "2", "--sp"), ("--tp", "1", "--dp", "2")])
def test_layouts_validate_and_decide_alike(stopped, cache, tmp_path, sizes):
    root, _, flags = stopped
    flags = [tmp_path / "save" if word == root / "save" else word for word in flags]
    rehearse(tmp_path / "out", cache, *SFT, *flags, *sizes)
    one, other = load(root / "save" / FILE), load(tmp_path / "save" / FILE)
    assert [entry.lr for entry in other.entries] == [entry.lr for entry in one.entries]
    for a, b in zip(one.entries, other.entries, strict=True):
        assert b.metrics["val_loss"] == pytest.approx(a.metrics["val_loss"], rel=1e-5)


REFUSED = {
    "--lr-plateau-metric val_loss": "needs --val-data and --val-interval",
    "--lr-plateau-metric val_loss --val-data {data}": "--val-data without --val-interval",
    "--val-interval 2": "--val-interval without --val-data",
    "--lr-plateau-metric eval/reward": "needs --eval-data and --eval-interval",
    "--lr-plateau-metric eval/other --val-data {data} --val-interval 1": "has val_loss and eval/reward",
    "--stop-min-lr 1e-5": "--stop-min-lr without --lr-plateau-metric",
    "--no-greater-is-better": "--greater-is-better without --lr-plateau-metric",
    "--val-data {data} --val-interval 1 --lr-plateau-metric val_loss --lr-plateau-factor 2": "--lr-plateau-factor 2.0",
    "--val-data {data} --val-interval 1 --lr-plateau-metric val_loss --stop-min-lr 1": "below --lr, which is 0.0001",
    "--val-data nowhere.jsonl --val-interval 1": "nowhere.jsonl: no such file",
    "--val-data {out}/metrics.jsonl --val-interval 1": "would be replaced by this run",
    "--val-data {empty} --val-interval 1": "no prompts in this file",
    "--objective grpo --val-data {data} --val-interval 1": "not computed by --objective grpo",
    "--val-data {data} --val-interval 0": "--val-interval 0: expected a whole number",
}


@pytest.mark.parametrize("words", REFUSED, ids=str)
def test_refuses_in_one_line(words, tmp_path, capsys, monkeypatch):
    from slime_plugins.lora.rehearsal.tiny import make_tiny

    monkeypatch.chdir(tmp_path)
    make_tiny(tmp_path / "base")
    (tmp_path / "data.jsonl").write_text(json.dumps({"input": "t5 t6", "label": "t7"}) + "\n")
    (tmp_path / "empty.jsonl").write_text("")
    os.makedirs("out")
    Path("out/settings.json").write_text("{}")
    Path("out/metrics.jsonl").write_text("x")
    flags = words.format(data="data.jsonl", empty="empty.jsonl", out="out").split()
    flags = flags if "--objective" in flags else ["--objective", "sft", *flags]
    given = ["--hf-checkpoint", "base", "--prompt-data", "data.jsonl", "--tp", "1", "--out", "out", "--lr", "1e-4"]
    capsys.readouterr()
    code = main(["rehearse", *given, *flags])
    err = capsys.readouterr().err
    assert code in (1, 2) and REFUSED[words] in err and err.count("\n") == 1, err


def test_settings_are_read_back(tmp_path):
    """``--config`` of a run with a plateau, a direction among it."""
    from slime_plugins.lora.cli.rehearse import _read_config
    from slime_plugins.lora.rehearsal.settings import Settings

    values = dict(lr_plateau_metric="val_loss", greater_is_better=False, stop_metric=0.2, lora_plus_ratio=4.0)
    (tmp_path / "settings.json").write_text(json.dumps(Settings(**values).to_dict()))
    read = _read_config(str(tmp_path / "settings.json"))
    assert {name: read[name] for name in values} == values


def test_only_what_is_typed_wins_over_a_config():
    import argparse

    from slime_plugins.lora.cli.rehearse import add_arguments

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert vars(parser.parse_args([])) == {}
    help_text = " ".join(parser.format_help().split())
    assert "multiplies the rate (default: 0.5)" in help_text and "expected" not in help_text


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_head_beside_the_start_is_carried_along(stopped, cache, tmp_path):
    """Through adapter, best, checkpoints and a resume with another --save, by name; never computed with."""
    from slime_plugins.lora.peft.extra import extra_of, put_extra

    root, _, _ = stopped
    shutil.copytree(root / "out" / "adapter", tmp_path / "start")
    head = {"score.weight": torch.randn(2, 8), "encoder.bias": torch.randn(3)}
    put_extra(tmp_path / "start", head)
    flags = ("--save", tmp_path / "save", *PLATEAU)
    log = rehearse(tmp_path / "out", cache, *SFT, "--steps", 1, "--lora-adapter-path", tmp_path / "start", *flags)
    assert "trained beside the adapter, carried along as they are: encoder.bias, score.weight" in log
    flags = ("--save", tmp_path / "next", "--load", tmp_path / "save", *PLATEAU)
    rehearse(tmp_path / "out 2", cache, *SFT, "--steps", 2, *flags)
    for place in ("out/adapter", "save", "save/best", "save/final", "out 2/adapter", "next", "next/best"):
        found = extra_of(tmp_path / place)
        assert found.keys() == head.keys() and all(torch.equal(found[name], head[name]) for name in head), place


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_start_as_reference_policy(stopped, cache, tmp_path):
    """KL exactly 0 before the first step, then more; resumed at another size from what the run has kept."""
    root, _, _ = stopped
    start = ("--lora-adapter-path", root / "out" / "adapter", "--rollout-batch-size", 8, "--n-samples-per-prompt", 4)
    flags = (*start, "--lora-ref", "start", "--save", tmp_path / "save", "--save-interval", 1)
    rehearse(tmp_path / "out", cache, "--tp", "1", "--steps", 3, *flags)
    kl = values(tmp_path / "out", "kl")
    assert kl[0] == 0 and all(value > 0 for value in kl[1:])
    shutil.rmtree(tmp_path / "save" / "iter_0000003")
    (tmp_path / "save" / "latest_checkpointed_iteration.txt").write_text("2")
    again = ("--load", tmp_path / "save", "--save", tmp_path / "next", "--steps", 3, *start[2:])
    rehearse(tmp_path / "out 2", cache, "--tp", "2", "--lora-ref", "start", *again)
    assert values(tmp_path / "out 2", "kl") == pytest.approx(kl[2:], rel=1e-3)
    assert (tmp_path / "next" / "reference" / "release" / "adapter.json").is_file()
    with Rehearsal(tmp_path / "out 3", cache, "--tp", "1", *map(str, again)) as run:
        code, log = run.wait()
    assert code == 2 and "was trained with --lora-ref start" in log
    rehearse(tmp_path / "out 4", cache, "--tp", "1", "--steps", 1, *start)
    assert values(tmp_path / "out 4", "kl")[0] > 1e-3, "by default it is the base"


def values(out: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (out / "metrics.jsonl").read_text().splitlines()]
