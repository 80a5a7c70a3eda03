"""Rewards of one's own: slime's signature, and every way in which such a function can be wrong.

pytest tests/rehearsal/test_rewards.py
"""

import sys

import pytest

from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.rehearsal.rewards import Rewarder, RewardSample, load_function
from slime_plugins.lora.rehearsal.settings import Settings

OWN = """
import asyncio

seen = []

async def slow(args, sample, **kwargs):
    await asyncio.sleep(0)
    seen.append((args.lr, args.lora_r, sample.index, sample.group_index, sample.status.value, sample.metadata))
    return len(sample.response)

def quick(args, sample):
    return sample.response == sample.label

def mixed(args, sample):
    return slow(args, sample) if sample.index else 0.5

def broken(args, sample):
    return {}["no such key"]

async def broken_later(args, sample):
    raise RuntimeError("the server is gone")

def none(args, sample):
    return None

def not_a_number(args, sample):
    return float("nan")

def of_one(sample):
    return 1

constant = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's, found from the current directory as a script is."""
    (tmp_path / "my_rewards.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    yield
    sys.modules.pop("my_rewards", None)


def sample(index, response="abc", **fields):
    return RewardSample(index=index, group_index=index // 2, prompt="p", response=response, label="abc", **fields)


def score(name, *samples):
    with Rewarder(Settings(custom_rm_path=f"my_rewards.{name}")) as rewarder:
        return rewarder(list(samples)), rewarder(list(samples))


@pytest.mark.parametrize(
    "name, expected", [("slow", [3.0, 2.0, 1.0]), ("quick", [1.0, 0.0, 0.0]), ("mixed", [0.5, 2.0, 1.0])]
)
def test_a_function_of_ones_own(own, name, expected):
    first, second = score(name, sample(0), sample(1, "ab"), sample(2, "a"))
    assert first == second == expected


def test_it_sees_flags_and_the_sample(own):
    score("slow", sample(3, metadata={"level": 2}, status=RewardSample.Status.TRUNCATED))
    assert sys.modules["my_rewards"].seen[0] == (5e-3, 8, 3, 1, "truncated", {"level": 2})


@pytest.mark.parametrize(
    "name, words",
    [
        ("broken", r"my_rewards.broken raised KeyError: 'no such key' \(.*my_rewards.py:18\)"),
        ("broken_later", r"raised RuntimeError: the server is gone \(.*my_rewards.py:21\)"),
        ("none", "gave None for the response 'abc', expected a finite number"),
        ("not_a_number", "gave nan for the response 'abc', expected a finite number"),
    ],
)
def test_what_it_does_wrong_is_named(own, name, words):
    with pytest.raises(ValueError, match=words):
        score(name, sample(0))


@pytest.mark.parametrize(
    "path, error, words",
    [
        ("quick", UsageError, "--custom-rm-path quick: expected module.function"),
        ("no_such.quick", UsageError, "no module no_such in .* or on PYTHONPATH"),
        ("my_rewards.deeper.quick", UsageError, "no module my_rewards.deeper"),
        ("my_rewards.quack", UsageError, "my_rewards has no function quack"),
        ("my_rewards.constant", UsageError, "my_rewards has no function constant"),
        ("my_rewards.of_one", UsageError, r"too many positional arguments; expected a function of \(args, sample\)"),
        ("needs.quick", ValueError, "needs needs no_such_package, which is not there"),
        ("typo.quick", ValueError, "importing it raised SyntaxError"),
    ],
)
def test_what_cannot_be_called_is_refused_before(own, tmp_path, path, error, words):
    (tmp_path / "needs.py").write_text("import no_such_package\n")
    (tmp_path / "typo.py").write_text("def quick(:\n")
    with pytest.raises(error, match=words) as info:
        load_function(path)
    assert type(info.value) is error
