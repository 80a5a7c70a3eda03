"""What several verbs have in common: places that are named, numbers that are numbers, what merging cost."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from slime_plugins.lora.errors import UsageError

if TYPE_CHECKING:
    from slime_plugins.lora.projections import Rounding


def place(text: str) -> str:
    """A path: ``type`` of an argument. An empty one would be the working directory."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} names no place")
    return text


def positive(text: str) -> float:
    """A finite number above 0: ``type`` of an argument."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or not 0 < value < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is no number above 0")
    return value


def check_out(flag: str, out: str, sources: Mapping[str, str | None]) -> None:
    """Raise UsageError where what is written would be what is read. ``sources``: flag -> path."""
    for name, source in sources.items():
        if source is not None and os.path.realpath(out) == os.path.realpath(source):
            raise UsageError(f"{flag} {out} is what {name} names, which is read; name another place")


def lost(rounding: Rounding) -> str:
    """What a merge lost, as a line for people."""
    return (
        f"lost to rounding: {rounding.lost_share:.2%} of the update by size "
        f"({rounding.unchanged:,} of {rounding.entries:,} weights did not move)"
    )
