"""Regular expressions out of an adapter's config, matched against module names in bounded time.

Python's ``re`` tries every way to match; an expression such as ``(a+)+b`` has more of them than there is time. Refused
are choices inside repetitions, references to groups, and more wildcards one after the other than anybody needs; what
is left takes at most ``length ** wildcards`` steps, on names that are short.
"""

from __future__ import annotations

import re
import sys
import time
from functools import lru_cache
from typing import Any

if sys.version_info >= (3, 11):
    from re import _constants as ops  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
else:
    import sre_constants as ops
    import sre_parse as parser

_LONGEST_PATTERN = 20_000
_LONGEST_NAME = 128
"""Of a module: a longer one is matched by no pattern but refused."""
_WILDCARD, _MOST_CHOICES = 5, 25
"""Five wildcards one after the other, or 25 parts that may be left out: seconds at most, on the longest name."""
_SLOW, _PATIENCE = 0.02, 5.0  # seconds: what counts as slow, and how much of it one pattern may take in all


class Pattern:
    """A compiled expression. Raises ValueError, saying why, for one that does not compile or could take forever."""

    def __init__(self, text: str):
        if len(text) > _LONGEST_PATTERN:
            raise ValueError(f"it has {len(text):,} characters")
        try:
            self._compiled = re.compile(text)
            choices = _choices(parser.parse(text))
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"it is no regular expression ({error})") from error
        if choices > _MOST_CHOICES:
            raise ValueError("it has too many wildcards one after the other, which could take forever")
        self._text, self._spent = text, 0.0

    def fullmatch(self, name: str) -> bool:
        return self._timed(self._compiled.fullmatch, name) is not None

    def match(self, name: str) -> re.Match[str] | None:
        return self._timed(self._compiled.match, name)

    def _timed(self, method, name: str) -> re.Match[str] | None:
        if len(name) > _LONGEST_NAME:
            raise ValueError(f"a module's name has {len(name)} characters ({name[:40]}...): no model has such names")
        if self._spent > _PATIENCE:
            raise ValueError(f"the regular expression {self._text!r:.80} takes too long to match: simplify it")
        start = time.perf_counter()
        found = method(name)
        spent = time.perf_counter() - start
        self._spent += spent if spent > _SLOW else 0.0
        return found


@lru_cache(maxsize=4096)
def pattern(text: str) -> Pattern:
    """The compiled expression, once."""
    return Pattern(text)


def _choices(parsed: Any, repeated: bool = False) -> int:
    """Most choices that one way through the expression meets: 1 for an optional part, ``_WILDCARD`` for a wildcard.

    Raises ValueError for choices inside repetitions, and for references to groups.
    """
    count = 0
    for op, argument in parsed:
        inner = 0
        if op in (ops.MAX_REPEAT, ops.MIN_REPEAT, getattr(ops, "POSSESSIVE_REPEAT", None)):
            low, high, body = argument
            inner = 0 if high == low else 1 if high - low == 1 else _WILDCARD
            inner += _choices(body, repeated or high > 1)
        elif op is ops.BRANCH:
            inner = max(_choices(branch, repeated) for branch in argument[1])
            if repeated:
                raise ValueError("it has alternatives inside repetitions, which could take forever")
        elif op is ops.SUBPATTERN:
            count += _choices(argument[3], repeated)
        elif op in (ops.ASSERT, ops.ASSERT_NOT):
            count += _choices(argument[1], repeated)
        elif op is getattr(ops, "ATOMIC_GROUP", None):
            count += _choices(argument, repeated)
        elif op in (ops.GROUPREF, ops.GROUPREF_EXISTS):
            raise ValueError("it refers back to a group, which could take forever")
        if inner and repeated:
            raise ValueError("it has repetitions inside repetitions, which could take forever")
        count += inner
    return count
