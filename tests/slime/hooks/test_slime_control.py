"""What slime's loop decides, on a trainer and engines that only answer: every cut and resume decides alike.

pytest tests/slime/hooks/test_slime_control.py
"""

from __future__ import annotations

import json
import random
import sys
from types import ModuleType, SimpleNamespace

import pytest

from slime_plugins.lora.control import history
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.slime.hooks.control import flags, loop


@pytest.fixture(autouse=True)
def slime(monkeypatch):
    """What the loop asks slime and Ray for."""
    misc = ModuleType("slime.utils.misc")
    misc.should_run_periodic_action = lambda rollout, interval, per_epoch=None, number=None: (
        interval is not None and (rollout == (number or 0) - 1 or (rollout + 1) % interval == 0)
    )
    for name in ("slime", "slime.utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "slime.utils.misc", misc)
    monkeypatch.setattr(loop, "_get", lambda answers: answers)
    monkeypatch.setattr(loop, "_log", lambda *words: None)
    monkeypatch.setattr(loop, "_current", None)


class Remote:
    """A Ray actor in this process."""

    def __init__(self, **methods):
        for name, method in methods.items():
            setattr(self, name, SimpleNamespace(remote=method))


class World:
    """A trainer whose validation after a rollout is given, saving as slime's loop does, dead where it shall be."""

    def __init__(self, where, values: list[float], **options):
        self.where, self.values, self.options = where, values, options
        self.calls: list[tuple] = []
        self.rates: list[float] = []
        self.saved = 0
        """Rollouts that the last checkpoint has seen."""

    def args(self, start: int) -> SimpleNamespace:
        load = str(self.where / "save") if start else None
        plain = {
            "use_lora": True, "val_data": "x", "val_interval": 1, "lr_plateau_metric": "val_loss", "lr": 1e-4,
            "greater_is_better": None, "lr_plateau_factor": 0.5, "lr_plateau_patience": 1,
            "lr_plateau_threshold": 0.05, "lr_plateau_threshold_mode": "rel", "lr_plateau_cooldown": 0,
            "stop_min_lr": 2e-5, "stop_metric": None, "eval_interval": None, "use_critic": False, "load": load,
            "finetune": False, "ckpt_step": None, "save": str(self.where / "save"), "save_interval": 2,
            "lora_export_dir": str(self.where / "export"), "num_rollout": len(self.values), "start_rollout_id": start,
            "debug_train_only": False, "offload_rollout": False, "rollout_global_dataset": False,
        }  # fmt: skip
        return SimpleNamespace(**{**plain, **self.options})

    def control(self, what, *words):
        self.calls.append((what, *words))
        if what in ("begin", "set_rate"):
            self.rate = words[0]
        if what == "measured":
            return self.values[words[0]]
        if what == "save":
            self.save(words[0])
        return None

    def evaluation(self, rollout: int) -> dict[str, float]:
        return {"eval/toy": self.values[rollout]}

    def evaluate(self, rollout: int) -> None:
        self.calls.append(("eval", rollout))

    def save(self, rollout: int) -> None:
        step = self.where / "save" / f"iter_{rollout:07d}"
        step.mkdir(parents=True, exist_ok=True)
        (step / "adapter.json").write_text("{}")
        (self.where / "save" / "latest_checkpointed_iteration.txt").write_text(str(rollout))
        self.saved = rollout + 1

    def train(self, start: int = 0, die_before_validation_of: int | None = None) -> int:
        """slime's loop. Returns the number of rollouts that were trained on."""
        args = self.args(start)
        group = SimpleNamespace(_actor_handlers=[Remote(lora_control=self.control)])
        manager = Remote(lora_evaluation=self.evaluation, eval=self.evaluate)
        args.num_rollout = loop.start_of_run(args, None, group, None, manager)
        for rollout in range(args.start_rollout_id, args.num_rollout):
            self.rates[rollout:] = [self.rate]
            if (rollout + 1) % args.save_interval == 0 or rollout == args.num_rollout - 1:
                self.save(rollout)
            if rollout == die_before_validation_of:
                break
            if loop.end_of_rollout(rollout):
                break
        return len(self.rates)

    def history(self) -> str:
        return (self.where / "save" / history.FILE).read_text()


def series(seed: int) -> list[float]:
    rng = random.Random(seed)
    return [round(1.0 + 0.1 * rng.random() - 0.02 * i, 4) for i in range(12)]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("metric", ["val_loss", "eval/toy"])
def test_every_cut_and_resume_decides_as_the_run_that_went_on(tmp_path, seed, metric):
    """Cut off at every rollout, between checkpoint and validation, and resumed from the last checkpoint."""
    values = series(seed)
    options = {"lr_plateau_metric": metric}
    if metric != "val_loss":
        options |= {"val_interval": None, "eval_interval": 1}
    whole = World(tmp_path / "whole", values, **options)
    trained = whole.train()
    for cut in range(1, trained):
        parted = World(tmp_path / f"cut {cut}", values, **options)
        parted.train(die_before_validation_of=cut)
        if parted.saved:
            parted.train(start=parted.saved)
        else:
            parted.train()
        assert parted.history() == whole.history() and parted.rates == whole.rates


def test_the_users_case(tmp_path):
    """1e-4, halved after two validations that are not 5 % better, stopped below 6e-5; saved though it is not due."""
    world = World(tmp_path, [1.0, 0.97, 0.96, 0.5, 0.4], stop_min_lr=6e-5)
    assert world.train() == 3
    done = history.load(tmp_path / "save" / history.FILE)
    assert done.state.lr == 5e-5 and done.stopped_at == 3 and done.state.best_step == 3
    assert world.saved == 3 and [call[:2] for call in world.calls if call[0] == "keep"][-1] == ("keep", "final")
    assert World(tmp_path / "2", [0.5, 0.19, 0.1], stop_metric=0.2, stop_min_lr=6e-5).train() == 2, "loss below 0.2"


def test_a_stopped_run_ends_at_launch_with_exit_code_0(tmp_path, capsys, monkeypatch):
    from slime_plugins.lora.checkpoint.manifest import Manifest

    world = World(tmp_path, [1.0, 0.97, 0.96, 0.5], stop_min_lr=6e-5)
    world.train()
    monkeypatch.setattr(Manifest, "read", lambda directory: SimpleNamespace(step=2))
    args = world.args(3)
    args.start_rollout_id, args.val_data = None, None
    with pytest.raises(SystemExit) as end:
        flags.set_up(args)
    assert end.value.code == 0
    assert "this run has stopped, after step 3: the learning rate 5e-05 is below" in capsys.readouterr().out
    args.stop_min_lr = 1e-6
    flags.set_up(args)


def test_an_evaluation_without_the_metric_is_an_error(tmp_path):
    world = World(tmp_path, [1.0], lr_plateau_metric="eval/math", val_interval=None, eval_interval=1)
    with pytest.raises(
        ValueError, match=r"eval/math: the evaluation after rollout 0 has no such reward, it has eval/toy"
    ):
        world.train()


def test_a_fresh_run_takes_nothing_over_from_another_ones_history(tmp_path):
    World(tmp_path, [0.1, 0.2, 0.3, 0.4]).train()
    fresh = World(tmp_path, [1.0, 0.9, 0.8, 0.7])
    fresh.train(die_before_validation_of=0)
    assert json.loads(fresh.history())["validations"] == []


def test_a_run_without_the_flags_is_slimes(tmp_path):
    world = World(tmp_path, [1.0, 1.0], lr_plateau_metric=None, val_interval=None)
    world.rate = 1.0
    assert world.train() == 2 and world.calls == [] and not (tmp_path / "save" / history.FILE).exists()


def test_rewards_are_kept_from_slimes_own_evaluation():
    class Manager:
        args = SimpleNamespace(use_lora=True, lr_plateau_metric="eval/a", val_interval=None)
        lora_evaluation = loop.lora_evaluation

        def __init__(self, output):
            self.eval_generate_rollout = lambda: output

        @loop.evaluating
        def eval(self, rollout_id):
            return self.eval_generate_rollout()

    data = {"a": {"rewards": [1, 0, 0, 1]}, "b": {"rewards": [0.5]}}
    for output in (data, SimpleNamespace(data=data)):
        manager = Manager(output)
        own = manager.eval_generate_rollout
        assert manager.eval(3) is output and manager.eval_generate_rollout is own
        assert manager.lora_evaluation(3) == {"eval/a": 0.5, "eval/b": 0.5}
        assert manager.lora_evaluation(4) == {}, "of another rollout"


def test_the_doctor_reads_no_data_and_ends_no_process():
    """It knows the words alone: neither slime's readers nor what --eval-config names."""
    from slime_plugins.lora.slime import checkup

    plain = ["--use-lora", "--num-layers", "2", "--lr", "1e-4", "--save", "s", "--load", "x"]
    by_rewards = [*plain, "--lr-plateau-metric", "eval/a", "--eval-interval", "2"]
    by_loss = [*plain, "--val-interval", "1", "--val-data", "nowhere"]
    for words in (by_rewards, by_loss):
        assert [finding.state for finding in checkup._arguments(words)] == ["ok"]
    (wrong,) = checkup._arguments([*by_loss, "--lr-plateau-metric", "loss"])
    assert "expected val_loss or eval/NAME" in wrong.text


def test_flags_without_use_lora_are_refused():
    args = SimpleNamespace(val_data=None, val_interval=3, lr_plateau_metric="val_loss")
    with pytest.raises(UsageError, match="--val-interval, --lr-plateau-metric given without --use-lora"):
        flags.refuse_unread(args)
