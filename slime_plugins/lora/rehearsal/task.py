"""Prompts with labels, and rewards that compare a decoded answer with its label. No model.

The built-in task is ``recall``: five different digits and an ordinal word; the answer is the digit in that place.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ORDINALS = ("first", "second", "third", "fourth", "fifth")
DIGITS = tuple(str(digit) for digit in range(10))
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Prompt:
    """One line of the prompt file."""

    prompt: str | list
    """Text, or chat messages."""
    label: str


def read_prompts(path: str | Path, input_key: str, label_key: str) -> list[Prompt]:
    """Read a jsonl file, one object per line. Empty lines are skipped.

    Raises:
        ValueError: naming file and line: not JSON, not an object, a key missing, a prompt or label of a wrong kind;
            or no prompt at all.
    """
    prompts = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                prompts.append(_read_line(line, f"{path}:{number}", input_key, label_key))
    if not prompts:
        raise ValueError(f"{path}: no prompts in this file, expected one JSON object per line")
    return prompts


def _read_line(line: str, where: str, input_key: str, label_key: str) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
    for key, flag in ((input_key, "--input-key"), (label_key, "--label-key")):
        if key not in row:
            raise ValueError(f"{where}: no key {key!r} ({flag}), this line has: {', '.join(row) or 'none'}")
    prompt, label = row[input_key], row[label_key]
    if not isinstance(prompt, (str, list)) or not prompt:
        raise ValueError(f"{where}: {input_key!r} is {prompt!r}, expected text or a list of chat messages")
    if isinstance(label, (list, dict)) or label is None:
        raise ValueError(f"{where}: {label_key!r} is {label!r}, expected text or a number")
    return Prompt(prompt, str(label))


def shuffled(items: Sequence[Any], seed: int) -> Iterator[Any]:
    """All items in a random order, again and again, reshuffled every time. Same seed, same order."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(items, len(items))


def recall_prompts(count: int, seed: int) -> list[dict[str, str]]:
    """Lines of the built-in task: ``{"input": "3 1 4 5 9 third", "label": "4"}``."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        digits, place = rng.sample(DIGITS, len(ORDINALS)), rng.randrange(len(ORDINALS))
        rows.append({"input": " ".join([*digits, ORDINALS[place]]), "label": digits[place]})
    return rows


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


REWARDS: dict[str, Callable[[str, str], float]] = {"exact": exact, "number": number}
