"""The flags: defaults from LoRAConfig, both spellings, and combinations that are refused or warned of.

pytest tests/core/test_arguments.py
"""

from __future__ import annotations

import argparse
import shlex

import pytest

from slime_plugins.lora import LoRAConfig, add_lora_arguments, validate_lora_args
from slime_plugins.lora.errors import UsageError


def parse(line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--lr", type=float, default=1e-4)
    return add_lora_arguments(parser).parse_args(shlex.split(line))


def test_defaults_are_the_configs():
    assert LoRAConfig.from_args(parse("--use-lora")) == LoRAConfig()
    assert parse("--use-lora").lora_only_trainable and not parse("").use_lora


def test_every_flag_reaches_the_config():
    args = parse(
        "--use-lora --lora-rank 4 --lora-alpha 6 --lora-dropout 0.1 --lora-target-modules q_proj,k_proj linear_fc2 "
        "--lora-exclude-modules '*.layers.0.*' --lora-layout split --lora-rslora --lora-init gaussian "
        """--lora-dtype float32 --lora-rank-pattern '{"q_proj": 2}' --lora-alpha-pattern '{"q_proj": 3}' """
        "--no-lora-only-trainable"
    )
    assert not args.lora_only_trainable
    args.seed = 77
    assert LoRAConfig.from_args(args) == LoRAConfig(
        rank=4,
        alpha=6,
        dropout=0.1,
        target_modules=("q_proj", "k_proj", "linear_fc2"),
        exclude_modules=("*.layers.0.*",),
        layout="split",
        use_rslora=True,
        init="gaussian",
        dtype="float32",
        rank_pattern={"q_proj": 2},
        alpha_pattern={"q_proj": 3},
        seed=77,
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--use-lora --lora-r 0", ["rank is 0"]),
        ("--use-lora --lora-alpha 0", ["alpha is 0"]),
        ("--use-lora --lora-dropout 1", ["dropout is 1.0"]),
        ("--lora-r 4 --lora-rslora", ["--lora-r, --lora-rslora given without --use-lora"]),
        ("--no-lora-only-trainable", ["--lora-only-trainable given without --use-lora"]),
    ],
)
def test_bad_values_are_refused(line, words):
    with pytest.raises(UsageError) as caught:
        validate_lora_args(parse(line))
    assert all(word in str(caught.value) for word in words)


def test_a_full_training_learning_rate_is_warned_of():
    with pytest.warns(UserWarning, match="--lr 1e-06 is a learning rate for full training; LoRA wants about 10x"):
        validate_lora_args(parse("--use-lora --lr 1e-6"))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("line", ["--use-lora --lr 1e-5", "--lr 1e-6", "--use-lora --lr 0"])
def test_other_learning_rates_are_not(line):
    validate_lora_args(parse(line))


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_patterns_must_be_json_objects(text):
    with pytest.raises(argparse.ArgumentError, match="JSON"):
        parse(f"--lora-rank-pattern '{text}'")
