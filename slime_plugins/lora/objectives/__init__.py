"""What adapters are trained to do, one file per objective. Tensors in, tensors out: no model, no process group.

A new objective is a file with a subclass of ``objective.Objective`` and a row here.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slime_plugins.lora.objectives.objective import Objective

OBJECTIVES = {"grpo": "GRPO", "sft": "SFT", "gkd": "GKD"}
"""Name, which is that of its module here -> class. Names alone, so that a help text costs no torch."""


def objective_class(name: str) -> type[Objective]:
    """The class of a name in ``OBJECTIVES``."""
    return getattr(importlib.import_module(f"{__name__}.{name}"), OBJECTIVES[name])


def make_objective(name: str, options: object) -> Objective:
    """An objective, its hyperparameters taken from the attributes of ``options`` that have their names."""
    cls = objective_class(name)
    return cls(**{option: getattr(options, option) for option in option_names(cls)})


def option_names(cls: type[Objective]) -> tuple[str, ...]:
    """Names of an objective's hyperparameters."""
    return tuple(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type] # each is a dataclass
