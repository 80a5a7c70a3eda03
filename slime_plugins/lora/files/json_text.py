"""JSON from anyone: damage, depth, repeated names and broken text are one ValueError, never a traceback."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any

from slime_plugins.lora.files.regular import read_small

_DEPTH = 64
"""Levels of nesting: configs and headers have four or five."""


def read_json(path: str | os.PathLike) -> Any:
    """The value in a JSON file. Raises OSError, or ValueError naming the file."""
    data = read_small(path)
    try:
        return parse_json(data)
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """The object in a JSON file. Raises OSError, or ValueError naming the file."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def parse_json(data: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: not JSON, a name twice in one object, nested deeper than any file that is read here, or text that
            is no Unicode.
    """
    try:
        text = data.decode() if isinstance(data, bytes) else data
        value = json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError(f"nested deeper than {_DEPTH} levels") from None
    _check_depth(value)
    if "\\ud" in text.lower():  # half of a pair cannot be printed
        _check_text(value)
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice[:80]!r} is there twice in one object")
    return found


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEPTH):
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, (dict, list))]
        if not level:
            return
    raise ValueError(f"nested deeper than {_DEPTH} levels")


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _check_text(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("holds half of a surrogate pair, which is no text") from error
