"""The plateau rule against torch's, on thousands of series; the user's case; histories. pytest tests/control"""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from slime_plugins.lora.control import history
from slime_plugins.lora.control.history import FILE, History
from slime_plugins.lora.control.plateau import Plateau, State, Validation, decide, fold, start
from slime_plugins.lora.errors import UsageError

SERIES = 3000


def series(rng: random.Random, *, negative=False) -> list[float]:
    """A metric that falls, rises, stays and jumps; values meet each other and thresholds exactly, too."""
    values, value = [], rng.choice([1.0, 0.25, rng.uniform(0.01, 3)])
    for _ in range(rng.randrange(2, 25)):
        value = abs(rng.choice([value, value, value * rng.uniform(0.8, 1.1), value * 0.95, value + 0.05, 0.5, 0.0]))
        values.append(-value if negative else value)
        if rng.random() < 0.05:
            values.append(rng.choice([math.nan, math.inf if not negative else -math.inf]))
    return values


def rule_of(rng: random.Random, greater: bool) -> Plateau:
    return Plateau(
        metric=rng.choice(["val_loss", "eval/x"]),
        greater_is_better=greater,
        lr=rng.choice([1e-4, 3e-3]),
        factor=rng.choice([0.5, 0.1, 0.7]),
        patience=rng.randrange(4),
        threshold=rng.choice([0.0, 0.05, 1e-4, 0.3]),
        threshold_mode=rng.choice(["rel", "abs"]),
        cooldown=rng.randrange(3),
    )


def torchs(rule: Plateau, values: list[float]) -> list[tuple]:
    """(rate, value to beat, idle, cooldown) after every value."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rule.lr)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, "max" if rule.greater_is_better else "min", rule.factor, rule.patience, rule.threshold,
        rule.threshold_mode, rule.cooldown,
    )  # fmt: skip
    found = []
    for value in values:
        scheduler.step(value)
        state = (scheduler.num_bad_epochs, scheduler.cooldown_counter)
        found.append((optimizer.param_groups[0]["lr"], scheduler.best, *state))
    return found


def ours(rule: Plateau, values: list[float]) -> list[tuple]:
    state, found = start(rule), []
    for step, value in enumerate(values):
        state, _ = decide(rule, state, Validation(step, value))
        worst = -math.inf if rule.greater_is_better else math.inf
        reference = worst if state.reference is None else state.reference
        found.append((state.lr, reference, state.idle, state.cooldown))
    return found


@pytest.mark.parametrize("greater", [False, True])
def test_torchs_scheduler_step_for_step(greater):
    """Rates, the value to beat and both counters, bit for bit. (With rewards, infinite ones aside: see below.)"""
    rng, reduced, steps = random.Random(greater), 0, 0
    for _ in range(SERIES):
        rule, values = rule_of(rng, greater), series(rng)
        values = [value if value != math.inf or not greater else math.nan for value in values]
        found = ours(rule, values)
        assert found == torchs(rule, values), (rule, values)
        reduced, steps = reduced + (found[-1][0] < rule.lr), steps + len(values)
    assert reduced > SERIES / 3 and steps > 10 * SERIES


def test_of_values_below_zero_absolute_thresholds_are_torchs():
    rng = random.Random(7)
    for _ in range(SERIES):
        rule = Plateau(metric="eval/x", lr=1e-4, threshold=0.05, threshold_mode="abs", patience=rng.randrange(3))
        values = series(rng, negative=True)
        assert ours(rule, values) == torchs(rule, values)


def test_where_the_rule_is_not_torchs():
    """Rewards falling from -1: torch calls less than 5 % of decline an improvement, again and again."""
    rule = Plateau(metric="eval/x", lr=1e-4, patience=1)
    values = [-1.0, -1.04, -1.08, -1.12, -1.15]
    assert torchs(rule, values)[-1][0] == 1e-4
    assert ours(rule, values)[-1][0] == 2.5e-5
    better = [-1.0, -0.94]
    assert decide(rule, fold(rule, [Validation(0, better[0])]), Validation(1, better[1]))[0].reference == -0.94
    infinite = ours(rule, [1.0, math.inf])
    assert infinite[-1][1] == 1.0 and torchs(rule, [1.0, math.inf])[-1][1] == math.inf


USER = Plateau(metric="val_loss", lr=1e-4, factor=0.5, patience=1, threshold=0.05, stop_min_lr=6e-5, stop_metric=0.2)


@pytest.mark.parametrize(
    ("values", "lr", "stopped"),
    [
        ([0.9, 0.8, 0.78, 0.7], 1e-4, None),  # 0.78 is idle once; 0.7 beats 0.8 by more than 5 %
        ([0.9, 0.8, 0.78, 0.77], 5e-5, (4, "the learning rate 5e-05 is below --stop-min-lr 6e-05")),
        ([0.9, 0.5, 0.199], 1e-4, (3, "val_loss 0.199 is below --stop-metric 0.2")),
        ([0.9, 0.5, 0.2], 1e-4, None),
        ([0.9, 0.8, math.nan, math.nan], 5e-5, (4, "the learning rate 5e-05 is below --stop-min-lr 6e-05")),
    ],
)
def test_the_users_case(values, lr, stopped):
    """lr 1e-4, factor 0.5, patience 1, threshold 5 %, stop below 6e-5, stop at loss < 0.2."""
    past = History(USER, USER.lr)
    for step, value in enumerate(values, 1):
        past.add(step, {"val_loss": value})
    assert past.state.lr == lr and past.factor == lr / 1e-4
    assert past.state.stopped == (stopped and stopped[1])
    if stopped:
        assert past.entries[-1].step == stopped[0] and past.entries[-1].decision.endswith(f"stop: {stopped[1]}")
        past.add(9, {"val_loss": 0.01})
        assert past.state.lr == lr and past.entries[-1].decision == "", "after a stop nothing is decided"


def test_best_is_by_however_little_the_reference_by_the_threshold():
    state = fold(USER, [Validation(10, 1.0), Validation(20, 0.97), Validation(30, 0.98)])
    assert (state.best, state.best_step, state.reference, state.lr) == (0.97, 20, 1.0, 5e-5)


@pytest.mark.parametrize("cut", range(8))
def test_a_resume_anywhere_decides_as_the_run_that_went_on(tmp_path, cut):
    """In the middle of a patience window and of a cooldown; what comes after the resumed step is dropped."""
    rule = Plateau(metric="val_loss", lr=1e-4, patience=2, cooldown=1)
    values = [1.0, 0.9, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 0.97, 0.98]
    whole = History(rule, rule.lr)
    for step, value in enumerate(values, 1):
        whole.add(10 * step, {"val_loss": value, "eval/reward": -value})
        whole.write(tmp_path)
    resumed = history.read(tmp_path, rule, rule.lr, until=10 * cut)
    assert [entry.step for entry in resumed.entries] == [10 * step for step in range(1, cut + 1)]
    for step, value in list(enumerate(values, 1))[cut:]:
        resumed.add(10 * step, {"val_loss": value, "eval/reward": -value})
    assert resumed == whole and resumed.text() == whole.text() and whole.state.lr < 5e-5


def test_other_flags_decide_anew(tmp_path):
    """A stopped run stays stopped under its own flags, and goes on under others, on purpose."""
    past = History(USER, USER.lr)
    for step, value in enumerate([0.9, 0.8, 0.79, 0.79], 1):
        past.add(step, {"val_loss": value})
    past.write(tmp_path)
    assert history.read(tmp_path, USER, USER.lr, until=4).state.stopped
    lower = Plateau(metric="val_loss", lr=1e-4, stop_min_lr=1e-5)
    assert history.read(tmp_path, lower, 1e-4, until=4).state == State(lr=5e-5, reference=0.8, best=0.79, best_step=3)


def test_a_person_reads_the_file(tmp_path):
    past = History(USER, USER.lr)
    for step, value in ((5, 0.9), (10, 0.8), (15, math.nan), (20, 0.79)):
        past.add(step, {"val_loss": value})
    lines = past.write(tmp_path).read_text().splitlines()
    assert lines[4:8] == [
        '    {"step": 5, "lr": 0.0001, "val_loss": 0.9, "decision": "best so far"},',
        '    {"step": 10, "lr": 0.0001, "val_loss": 0.8, '
        '"decision": "best so far; better than 0.9 by more than 5 %"},',
        '    {"step": 15, "lr": 0.0001, "val_loss": "nan", "decision": "not finite; 1 in a row, 1 allowed"},',
        '    {"step": 20, "lr": 0.0001, "val_loss": 0.79, "decision": "best so far; not better than 0.8 by 5 %; '
        "2 in a row, 1 allowed; learning rate 0.0001 -> 5e-05; stop: the learning rate 5e-05 is below --stop-min-lr "
        '6e-05"}',
    ]
    content = json.loads("\n".join(lines))
    assert content["best"] == {"step": 20, "value": 0.79}
    assert content["stopped"] == {"step": 20, "why": "the learning rate 5e-05 is below --stop-min-lr 6e-05"}
    assert history.load(tmp_path / FILE).text() == past.text()
    assert history.read(tmp_path / "elsewhere", USER, USER.lr, until=5) is None


def test_a_history_without_a_rule_notes_alone(tmp_path):
    past = History(None, 1e-3)
    past.add(2, {"val_loss": 0.5})
    past.write(tmp_path)
    again = history.load(tmp_path / FILE)
    assert again.entries[0].metrics == {"val_loss": 0.5} and again.factor == 1 and not again.state.stopped


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"rule": {"metric": "x"}, "lr": 1, "validations": []}', '{"rule": null, "lr": 1}',
     '{"rule": null, "lr": 1, "validations": [{"lr": 1}]}', '{"rule": null, "lr": 1, "validations": [3]}',
     '{"rule": null, "lr": 1, "validations": [{"step": "1", "lr": 1}]}'],
)  # fmt: skip
def test_damaged_histories_are_named(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ValueError, match=FILE):
        history.load(tmp_path / FILE)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"metric": "loss"}, "--lr-plateau-metric loss: expected val_loss or eval/NAME"),
        ({"metric": "eval/"}, "expected val_loss or eval/NAME"),
        ({"factor": 1.0}, "--lr-plateau-factor 1.0: .* below 1"),
        ({"factor": math.nan}, "--lr-plateau-factor nan"),
        ({"patience": -1}, "--lr-plateau-patience -1"),
        ({"cooldown": -1}, "--lr-plateau-cooldown -1"),
        ({"threshold": 1.0}, "--lr-plateau-threshold 1.0: expected a share"),
        ({"threshold": math.nan, "threshold_mode": "abs"}, "--lr-plateau-threshold nan"),
        ({"threshold_mode": "x"}, "--lr-plateau-threshold-mode x"),
        ({"stop_min_lr": 1e-4}, "--stop-min-lr 0.0001: expected above 0 and below --lr, which is 0.0001"),
        ({"stop_min_lr": 0.0}, "--stop-min-lr 0"),
        ({"stop_metric": math.inf}, "--stop-metric inf"),
    ],
)
def test_rules_that_cannot_work(change, line):
    with pytest.raises(UsageError, match=line):
        Plateau(**({"metric": "val_loss", "lr": 1e-4} | change))
