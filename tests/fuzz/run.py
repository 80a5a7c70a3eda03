"""Damage one input after another and see what the verbs make of it.

Command: python tests/fuzz/run.py --cases 300 --seed 0      (cases of every kind; prints the table, exit code 1 if bad)

Right is: refused in one line with nothing written, or the result of the undamaged input. All else is a failure:
another result (wrong), an exception that nobody turned into a line (traceback), more than 10 seconds (hang).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    tests = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(tests.parent), str(tests), str(tests / "support")]

from fuzz import damage, inputs

from slime_plugins.lora.cli import main

PATIENCE = 10.0
COLUMNS = ("refused", "equal", "taken", "wrong", "traceback", "hang")
"""``taken``: only of forged input, whose own checksums fit what it says."""


class Hang(BaseException):
    """Raised by the alarm."""


@dataclass
class Outcome:
    """Of all cases of one kind."""

    kind: str
    counts: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    slowest: float = 0.0


def fuzz(kind: inputs.Kind, cases: int, seed: int, work: Path) -> Outcome:
    """Run ``cases`` seeded cases of one kind, in this process."""
    expected = run_once(kind, kind.source, work / "good")
    if expected[0] != "done":
        raise AssertionError(f"{kind.name}: the undamaged input gives {expected}")
    outcome = Outcome(kind.name)
    for number in range(cases):
        rng = random.Random(f"{kind.name} {seed} {number}")
        place = work / "case"
        files = damage.copy(kind.source, place / "in")
        files = [path for path in files if any(fnmatch(path.name, pattern) for pattern in kind.names)]
        how = rng.choice(damage.FORGED if kind.forged else damage.ALL)(files, rng)
        if kind.forged:
            inputs.forge(place / "in")
        start = time.perf_counter()
        word, detail = run_once(kind, place / "in", place)
        spent = time.perf_counter() - start
        outcome.seconds, outcome.slowest = outcome.seconds + spent, max(outcome.slowest, spent)
        if word == "done":
            word = "equal" if detail == expected[1] else "taken" if kind.forged else "wrong"
            detail = "another result, exit code 0"
        outcome.counts[word] += 1
        if word in ("wrong", "traceback", "hang"):
            outcome.failures.append(f"{kind.name}, seed {seed}, case {number}: {how}: {word}: {detail}")
        shutil.rmtree(place)
    return outcome


def run_once(kind: inputs.Kind, damaged: Path, place: Path) -> tuple[str, Any]:
    """``done`` with the result, ``refused``, or what went wrong with a word about it."""
    out = place / "out"
    argv = [str(damaged) if word == "{}" else str(out) if word == "OUT" else word for word in kind.argv]
    printed, said = io.StringIO(), io.StringIO()
    code: int | None = None
    try:
        with _alarm(PATIENCE), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
            code = main(argv)
    except Hang:
        return "hang", f"more than {PATIENCE} s"
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
        return "traceback", f"{type(error).__name__}: {error}"
    if code == 0:
        try:
            return "done", kind.result(out, printed.getvalue())
        except Exception as error:  # noqa: BLE001
            return "wrong", f"exit code 0, but what was written cannot be read: {type(error).__name__}: {error}"
    report = kind.argv[0] == "verify" and not said.getvalue()
    line = printed.getvalue().splitlines()[-1] if report and printed.getvalue() else said.getvalue()
    if report and not line.startswith("not ok: "):
        return "wrong", f"exit code {code} without a verdict: {line!r}"
    if not report and (line.count("\n") != 1 or not line.startswith("slime-lora: error: ") or len(line) > 1500):
        return "wrong", f"exit code {code} and not one line: {line[:300]!r}"
    if out.exists():
        return "wrong", "refused, but something was written"
    return "refused", line


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise ``Hang`` after that time. Another alarm that was set (pytest's own) is set again."""

    def ring(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    start = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 0.01))


def table(outcomes: list[Outcome]) -> str:
    rows = [("kind", "cases", *COLUMNS, "seconds", "slowest")]
    for one in outcomes:
        counts = [str(one.counts[word]) for word in COLUMNS]
        rows.append((one.kind, str(sum(one.counts.values())), *counts, f"{one.seconds:.1f}", f"{one.slowest:.2f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def run(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300, help="of every kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", default="", help="only kinds with this in their name")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        os.environ["XDG_CACHE_HOME"] = str(Path(directory, "cache"))
        with contextlib.redirect_stdout(io.StringIO()):
            made = inputs.kinds(Path(directory, "good"))
        outcomes = []
        for kind in made:
            if args.kind in kind.name:
                work = Path(directory, f"{zlib.crc32(kind.name.encode()):08x}")
                outcomes.append(fuzz(kind, args.cases, args.seed, work))
    print(table(outcomes))
    failures = [line for one in outcomes for line in one.failures]
    print("\n".join(failures))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(run())
