"""When to lower the learning rate and when to stop: a rule, and a fold of it over validations. Pure, stdlib only.

The rule is torch's ``ReduceLROnPlateau``, step for step, with these differences, each on purpose:

- the rate is not held at a lowest one: falling below ``stop_min_lr`` ends the run;
- with a relative threshold, better is ``reference -+ threshold * |reference|``. torch multiplies, so on rewards below
  0 a decline of less than the threshold counts as an improvement and the rate is never lowered;
- a value that is not finite is never better (to torch, an infinite reward is).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from slime_plugins.lora.errors import UsageError

VAL_LOSS = "val_loss"
"""Mean of -log p over all response tokens of the validation data, in nats."""
EVAL = "eval/"
"""What the names of evaluations start with; the rest is the user's own."""
MODES = ("rel", "abs")
_SMALLEST_CHANGE = 1e-8
"""A reduction by less is not made, as in torch (``eps``)."""


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """The rule, in the words of the flags.

    Raises:
        UsageError: on construction, naming the flag.
    """

    metric: str
    """``val_loss`` or ``eval/NAME``."""
    lr: float
    """That the run starts with."""
    greater_is_better: bool | None = None
    """None: of ``eval/`` yes, of ``val_loss`` no. After construction it is one or the other."""
    factor: float = 0.5
    """The rate is multiplied by it."""
    patience: int = 1
    """Validations in a row that may bring nothing; at the next such one the rate is lowered."""
    threshold: float = 0.05
    """By how much a value must be better to count as better."""
    threshold_mode: str = "rel"
    """``rel``: a share of the value to beat; ``abs``: that much."""
    cooldown: int = 0
    """Validations after a reduction that count nothing."""
    stop_min_lr: float | None = None
    """A rate below it ends the run."""
    stop_metric: float | None = None
    """A value better than it ends the run."""

    def __post_init__(self) -> None:
        if self.metric != VAL_LOSS and not (self.metric.startswith(EVAL) and self.metric != EVAL):
            raise UsageError(f"--lr-plateau-metric {self.metric}: expected {VAL_LOSS} or {EVAL}NAME")
        if self.greater_is_better is None:
            object.__setattr__(self, "greater_is_better", self.metric.startswith(EVAL))
        if not 0 < self.factor < 1:
            raise UsageError(
                f"--lr-plateau-factor {self.factor}: the rate is multiplied by it, expected above 0 and below 1"
            )
        for name in ("patience", "cooldown"):
            if getattr(self, name) < 0:
                raise UsageError(f"--lr-plateau-{name} {getattr(self, name)}: expected a number of validations")
        if self.threshold_mode not in MODES:
            raise UsageError(f"--lr-plateau-threshold-mode {self.threshold_mode}: expected {' or '.join(MODES)}")
        if not (0 <= self.threshold < (1 if self.threshold_mode == "rel" else math.inf)):
            share = "a share from 0 to below 1" if self.threshold_mode == "rel" else "0 or more"
            raise UsageError(f"--lr-plateau-threshold {self.threshold}: expected {share}")
        if self.stop_min_lr is not None and not 0 < self.stop_min_lr < self.lr:
            raise UsageError(
                f"--stop-min-lr {self.stop_min_lr:g}: expected above 0 and below --lr, which is {self.lr:g}"
            )
        if self.stop_metric is not None and not math.isfinite(self.stop_metric):
            raise UsageError(f"--stop-metric {self.stop_metric}: expected a finite number")

    def better(self, value: float, than: float) -> bool:
        """Strictly, without the threshold."""
        return value > than if self.greater_is_better else value < than

    def counts(self, value: float, reference: float) -> bool:
        """Is a value better by more than the threshold?"""
        sign = 1 if self.greater_is_better else -1
        if self.threshold_mode == "abs":
            return self.better(value, reference + sign * self.threshold)
        return self.better(value, reference * (1 + sign * math.copysign(self.threshold, reference)))


@dataclass(frozen=True)
class State:
    """What a run knows after some validations."""

    lr: float
    """Of the steps to come, under a constant schedule."""
    reference: float | None = None
    """The value to beat: the last that counted as better."""
    idle: int = 0
    """Validations in a row that brought nothing."""
    cooldown: int = 0
    """Validations to come that count nothing."""
    best: float | None = None
    """The best value of all, by however little."""
    best_step: int | None = None
    stopped: str | None = None
    """Why the run has ended."""


@dataclass(frozen=True)
class Validation:
    """One value of the rule's metric."""

    step: int
    """Steps of training before it."""
    value: float


def start(rule: Plateau) -> State:
    """Before the first validation."""
    return State(lr=rule.lr)


def decide(rule: Plateau, state: State, seen: Validation) -> tuple[State, str]:
    """The state after one more validation, and what was decided, in words."""
    words, value = [], seen.value
    changes: dict[str, Any] = {}
    finite = math.isfinite(value)
    if finite and (state.best is None or rule.better(value, state.best)):
        changes |= {"best": value, "best_step": seen.step}
        words.append("best so far")
    if finite and (state.reference is None or rule.counts(value, state.reference)):
        changes["reference"] = value
        idle = 0
        if state.reference is not None:
            words.append(f"better than {state.reference:g} by more than {_threshold(rule)}")
    else:
        idle = state.idle + 1
        words.append("not finite" if not finite else f"not better than {state.reference:g} by {_threshold(rule)}")
    cooldown = state.cooldown
    if cooldown > 0:
        cooldown, idle = cooldown - 1, 0
        words.append("cooling down")
    elif idle:
        words.append(f"{idle} in a row, {rule.patience} allowed")
    lr, stopped = state.lr, None
    if idle > rule.patience:
        cooldown, idle = rule.cooldown, 0
        if lr - lr * rule.factor > _SMALLEST_CHANGE:
            lr *= rule.factor
            words.append(f"learning rate {state.lr:g} -> {lr:g}")
    if finite and rule.stop_metric is not None and rule.better(value, rule.stop_metric):
        stopped = f"{rule.metric} {value:g} is {_side(rule)} --stop-metric {rule.stop_metric:g}"
    elif rule.stop_min_lr is not None and lr < rule.stop_min_lr:
        stopped = f"the learning rate {lr:g} is below --stop-min-lr {rule.stop_min_lr:g}"
    if stopped:
        words.append(f"stop: {stopped}")
    return dataclasses.replace(state, lr=lr, idle=idle, cooldown=cooldown, stopped=stopped, **changes), "; ".join(
        words
    )


def fold(rule: Plateau, validations: Iterable[Validation]) -> State:
    """What an uninterrupted run with these validations knows. Nothing is decided after a stop."""
    state = start(rule)
    for seen in validations:
        if state.stopped:
            break
        state, _ = decide(rule, state, seen)
    return state


def _threshold(rule: Plateau) -> str:
    return f"{100 * rule.threshold:g} %" if rule.threshold_mode == "rel" else f"{rule.threshold:g}"


def _side(rule: Plateau) -> str:
    return "above" if rule.greater_is_better else "below"
