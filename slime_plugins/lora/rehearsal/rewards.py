"""What an answer is worth: rules that compare it with its label, or a function of the user's own.

A function of one's own has slime's name and signature, so that the same file serves slime later:

    async def custom_rm(args, sample, **kwargs) -> float      # --custom-rm-path my_rewards.custom_rm; or without async
"""

from __future__ import annotations

import argparse
import asyncio
import enum
import importlib
import inspect
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.rehearsal.settings import Settings

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class Status(enum.Enum):
    """How an answer ended; slime's values."""

    COMPLETED = "completed"
    TRUNCATED = "truncated"


@dataclass(kw_only=True)
class RewardSample:
    """One answer, as a reward function sees it: the fields of slime's ``Sample`` that there are without servers."""

    Status: ClassVar[type[Status]] = Status

    index: int
    """Of the answer in its step."""
    group_index: int
    """Of its prompt in its step."""
    prompt: str | list
    """As the file has it, before any chat template."""
    response: str
    """Decoded, special tokens left out."""
    label: str | None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    """Prompt and response."""
    response_length: int = 0
    """Tokens."""
    status: enum.Enum = Status.COMPLETED
    reward: float = 0.0
    """Filled with what the function returns."""


def exact(response: str, label: str) -> float:
    """1 if the whole response is the label, up to white space around it."""
    return float(response.strip() == label.strip())


def number(response: str, label: str) -> float:
    """1 if the last number in the response is the label's last number: for worked answers."""
    found, wanted = _last_number(response), _last_number(label)
    return float(found is not None and found == wanted)


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


RULES: dict[str, Callable[[str, str], float]] = {"exact": exact, "number": number}


class Rewarder:
    """Rewards of answers, by the rule or the function that the settings name. A context manager."""

    def __init__(self, settings: Settings):
        """Raises UsageError for a function that cannot be found."""
        self._path, self._rule = settings.custom_rm_path, RULES[settings.rm_type]
        self._own = load_function(self._path) if self._path is not None else None
        self._args = settings.namespace()
        self._loop: asyncio.AbstractEventLoop | None = None  # one for all steps: sessions of slime's kind outlive one

    def __call__(self, samples: Sequence[RewardSample]) -> list[float]:
        """One finite number for each.

        Raises:
            ValueError: a function of the user's own raised, or gave something else.
        """
        if self._own is None:
            return [self._rule(sample.response, sample.label or "") for sample in samples]
        return [self._number(value, sample) for value, sample in zip(self._call(self._own, samples), samples)]

    def _call(self, own: Callable[[argparse.Namespace, RewardSample], Any], samples: Sequence[RewardSample]) -> list:
        try:
            values = [own(self._args, sample) for sample in samples]
            if any(inspect.isawaitable(value) for value in values):
                self._loop = self._loop or asyncio.new_event_loop()
                values = self._loop.run_until_complete(_gather(values))
            return values
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise ValueError(
                f"--custom-rm-path {self._path} raised {type(error).__name__}: {error} "
                f"({last.filename}:{last.lineno}); --debug shows the traceback"
            ) from error

    def _number(self, value: Any, sample: RewardSample) -> float:
        try:
            reward = float(value)
        except (TypeError, ValueError):
            reward = math.nan
        if not math.isfinite(reward):
            raise ValueError(
                f"--custom-rm-path {self._path} gave {value!r} for the response {sample.response[:200]!r}, "
                "expected a finite number"
            )
        return reward

    def __enter__(self) -> Rewarder:
        return self

    def __exit__(self, *exc) -> None:
        if self._loop is not None:
            self._loop.close()


async def _gather(values: Sequence[Any]) -> list[Any]:
    async def settled(value: Any) -> Any:
        return await value if inspect.isawaitable(value) else value

    return await asyncio.gather(*(settled(value) for value in values))


def load_function(path: str) -> Callable[[argparse.Namespace, RewardSample], Any]:
    """The function that ``module.function`` names; the module is looked for in the current directory first.

    Raises:
        UsageError: no such module or function, or it cannot be called with (args, sample).
        ValueError: importing the module failed.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name or not name:
        raise UsageError(f"--custom-rm-path {path}: expected module.function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m has it; the slime-lora script has its own directory there
    try:
        function = getattr(importlib.import_module(module_name), name, None)
    except ModuleNotFoundError as error:
        if error.name is not None and not (module_name + ".").startswith(error.name + "."):
            raise ValueError(
                f"--custom-rm-path {path}: {module_name} needs {error.name}, which is not there"
            ) from None
        raise UsageError(
            f"--custom-rm-path {path}: no module {module_name} in {os.getcwd()} or on PYTHONPATH"
        ) from None
    except Exception as error:
        raise ValueError(f"--custom-rm-path {path}: importing it raised {type(error).__name__}: {error}") from error
    if not callable(function):
        raise UsageError(f"--custom-rm-path {path}: {module_name} has no function {name}")
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        raise UsageError(
            f"--custom-rm-path {path}: {error}; expected a function of (args, sample), as slime calls it"
        ) from None
    return function
