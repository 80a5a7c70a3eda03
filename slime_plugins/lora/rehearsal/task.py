"""Prompts with labels. No model.

The built-in task is ``recall``: five different digits and an ordinal word; the answer is the digit in that place.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ORDINALS = ("first", "second", "third", "fourth", "fifth")
DIGITS = tuple(str(digit) for digit in range(10))


@dataclass(frozen=True)
class Prompt:
    """One line of the prompt file."""

    prompt: str | list
    """Text, or chat messages."""
    label: str | None
    """None where rewards of one's own do without."""
    response: str = ""
    """To train on, where responses are given."""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Where in a line of the file things are."""

    input: str = "input"
    label: str = "label"
    label_required: bool = True
    response: str | None = None
    """None: no response is read."""
    metadata: str = "metadata"


def read_prompts(path: str | Path, keys: Keys) -> list[Prompt]:
    """Read a jsonl file, one object per line. Empty lines are skipped.

    Raises:
        ValueError: naming file and line: not JSON, not an object, a key missing, a prompt or label of a wrong kind;
            or no prompt at all.
    """
    prompts = []
    with open(path, encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    prompts.append(_read_line(line, f"{path}:{number}", keys))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text: {error}") from None
    if not prompts:
        raise ValueError(f"{path}: no prompts in this file, expected one JSON object per line")
    return prompts


def _read_line(line: str, where: str, keys: Keys) -> Prompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
    prompt = _value(row, keys.input, "--input-key", where)
    if not isinstance(prompt, (str, list)) or not prompt:
        raise ValueError(f"{where}: {keys.input!r} is {prompt!r}, expected text or a list of chat messages")
    label = _text(row, keys.label, "--label-key", where) if keys.label_required or keys.label in row else None
    response = "" if keys.response is None else _text(row, keys.response, "--response-key", where)
    metadata = row.get(keys.metadata) or {}
    if not isinstance(metadata, dict):
        raise ValueError(f"{where}: {keys.metadata!r} (--metadata-key) is {metadata!r}, expected a JSON object")
    return Prompt(prompt, label, response, metadata)


def _value(row: dict, key: str, flag: str, where: str) -> Any:
    if key not in row:
        raise ValueError(f"{where}: no key {key!r} ({flag}), this line has: {', '.join(row) or 'none'}")
    return row[key]


def _text(row: dict, key: str, flag: str, where: str) -> str:
    value = _value(row, key, flag, where)
    if isinstance(value, (list, dict)) or value is None:
        raise ValueError(f"{where}: {key!r} is {value!r}, expected text or a number")
    return str(value)


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
