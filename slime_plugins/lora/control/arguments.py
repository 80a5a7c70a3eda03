"""The flags of a plateau rule, the same in slime and in the rehearsal. Pure argparse."""

from __future__ import annotations

import argparse
from typing import Any

from slime_plugins.lora.control.plateau import MODES, Plateau
from slime_plugins.lora.errors import UsageError

_DEFAULTS: dict[str, Any] = {
    "greater_is_better": None,
    "lr_plateau_factor": Plateau.factor,
    "lr_plateau_patience": Plateau.patience,
    "lr_plateau_threshold": Plateau.threshold,
    "lr_plateau_threshold_mode": Plateau.threshold_mode,
    "lr_plateau_cooldown": Plateau.cooldown,
    "stop_min_lr": None,
    "stop_metric": None,
}
"""Destination -> default, of the flags that need ``--lr-plateau-metric``."""


def add_plateau_arguments(group) -> None:
    """Add the flags to a parser or a group of one."""

    def add(flag: str, **kwargs) -> None:
        kwargs.setdefault("default", _DEFAULTS.get(flag[2:].replace("-", "_")))
        group.add_argument(flag, **kwargs)

    add(
        "--lr-plateau-metric",
        metavar="NAME",
        help="val_loss (of --val-data), or eval/NAME (an evaluation's reward): where it stops getting better, lower "
        "the learning rate; also what --stop-metric and the best adapter go by",
    )
    add(
        "--greater-is-better",
        action=argparse.BooleanOptionalAction,
        help="of that metric (default: of eval/NAME yes, of val_loss no)",
    )
    add("--lr-plateau-factor", type=float, metavar="X", help="multiplies the rate (default: %(default)s)")
    add("--lr-plateau-patience", type=int, metavar="N", help="validations that may bring nothing (%(default)s)")
    add("--lr-plateau-threshold", type=float, metavar="X", help="what counts as better (default: %(default)s)")
    add("--lr-plateau-threshold-mode", choices=MODES, help="a share of the best value, or absolute (%(default)s)")
    add("--lr-plateau-cooldown", type=int, metavar="N", help="validations after it that count nothing (%(default)s)")
    add("--stop-min-lr", type=float, metavar="X", help="stop where the rate falls below it (default: never)")
    add("--stop-metric", type=float, metavar="X", help="stop where the metric is better than it (default: never)")


def plateau_of(options: Any) -> Plateau | None:
    """The rule that parsed flags give, with ``lr``; None without ``--lr-plateau-metric``.

    Raises:
        UsageError: flags that cannot work, or that need ``--lr-plateau-metric``.
    """
    if options.lr_plateau_metric is None:
        given = [name for name, default in _DEFAULTS.items() if getattr(options, name) != default]
        if given:
            shown = ", ".join("--" + name.replace("_", "-") for name in given)
            raise UsageError(f"{shown} without --lr-plateau-metric, which says what it goes by; add that, or drop it")
        return None
    values = {name.removeprefix("lr_plateau_"): getattr(options, name) for name in _DEFAULTS}
    return Plateau(metric=options.lr_plateau_metric, lr=options.lr, **values)
