"""Damaged input of every kind is refused in one line, or does not matter. Command: pytest tests/fuzz

The table, with any number of cases: python tests/fuzz/run.py --cases 300
"""

from __future__ import annotations

import pytest
from fuzz import inputs
from fuzz.run import fuzz

NAMES = (
    "base: merge", "base: export", "base: import", "base: verify", "adapter: verify", "adapter: import",
    "adapter .bin: import", "checkpoint: export", "checkpoint, forged", "ZeRO-2: convert", "ZeRO-3: convert",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("good")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        yield {kind.name: kind for kind in inputs.kinds(root / "inputs")}


def check(kind: inputs.Kind, cases: int, seed: int, work) -> None:
    outcome = fuzz(kind, cases, seed, work)
    assert not outcome.failures, "\n".join(outcome.failures)
    assert outcome.counts["refused"] > cases / 2  # the damage is done, and seen


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_refused_or_does_not_matter(made, tmp_path, name):
    check(made[name], 40, 0, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NAMES)
def test_much_damage(made, tmp_path, name):
    check(made[name], 1000, 1, tmp_path)


def test_every_kind_is_tried(made):
    assert set(made) == set(NAMES)
