"""Validation data as slime's trainer gets it, and how its microbatches are dealt out.

pytest tests/slime/hooks/test_slime_validation.py
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.slime.hooks.control import data, trainer
from slime_plugins.lora.slime.hooks.control.data import Given


class Tokenizer:
    eos_token_id = 2

    def __call__(self, text, add_special_tokens):
        assert add_special_tokens is False
        return SimpleNamespace(input_ids=[int(word) for word in text.split()])


def read(monkeypatch, *samples, **options) -> list[Given]:
    """``data.read`` of what slime's reader would give."""
    modules = {name: ModuleType(name) for name in ("slime", "slime.utils")}
    modules |= {f"slime.utils.{name}": ModuleType(name) for name in ("data", "processing_utils", "mask_utils")}

    class Masks:
        """The response of a conversation is what follows its zeros."""

        def __init__(self, tokenizer, tokenizer_type):
            assert tokenizer_type == "qwen"

        def get_loss_mask(self, messages, tools=None):
            return list(range(len(messages))), [int(m["role"] == "assistant") for m in messages]

        def get_response_lengths(self, masks):
            return [len(mask) - mask.index(1) if 1 in mask else 0 for mask in masks]

    def dataset(path, **words):
        if path == "none":
            raise KeyError("no such key")
        return SimpleNamespace(samples=[SimpleNamespace(prompt=p, label=of, metadata={}) for p, of in samples])

    modules["slime.utils.data"].Dataset = dataset
    modules["slime.utils.processing_utils"].load_tokenizer = lambda path, **words: Tokenizer()
    modules["slime.utils.mask_utils"].MultiTurnLossMaskGenerator = Masks
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    plain = dict.fromkeys(("hf_checkpoint", "metadata_key", "tool_key", "apply_chat_template_kwargs"))
    plain |= {"val_data": "x", "input_key": "p", "label_key": "l", "apply_chat_template": False}
    return data.read(SimpleNamespace(**{**plain, "loss_mask_type": "qwen", **options}))


def test_text_and_messages(monkeypatch):
    talk = [{"role": role} for role in ("user", "assistant", "user", "assistant")]
    found = read(monkeypatch, ("5 6", "7"), (talk, None), ([{"role": "user"}], None))
    assert found == [Given([5, 6, 7, 2], 2, [1, 1]), Given([0, 1, 2, 3], 3, [1, 0, 1])], "the last counts nothing"


def test_refused(monkeypatch):
    with pytest.raises(UsageError, match="none of its 1 samples has a response token that counts"):
        read(monkeypatch, ([{"role": "user"}], None))
    with pytest.raises(UsageError, match="sample 1 is a prompt without a response; name the key of responses"):
        read(monkeypatch, ("5", "6"), ("5", None))
    with pytest.raises(UsageError, match="sample 0 has no token in front of its response"):
        read(monkeypatch, ("", "6"))
    with pytest.raises(UsageError, match="--val-data none: slime cannot read it with --input-key p and --label-key l"):
        read(monkeypatch, val_data="none")


SAMPLES = [Given([i] * length, 2, [1, 1]) for i, length in enumerate((5, 3, 9, 2, 2, 7, 4))]


@pytest.mark.parametrize("places, multiple", [(1, 1), (2, 1), (3, 1), (2, 4)])
def test_every_sample_counts_once_in_any_layout(places, multiple):
    """The microbatches are those of one rank; ranks have equally many, what is filled up has no weight."""
    args = SimpleNamespace(use_dynamic_batch_size=True, max_tokens_per_gpu=5, context_parallel_size=2)
    micros = list(trainer._packed(args, SAMPLES))
    assert [one for micro in micros for one in micro] == SAMPLES
    assert all(sum(len(one.tokens) for one in micro) <= 10 for micro in micros), "5 tokens on each of 2 ranks"
    shares = [trainer._share(micros, place, places, multiple) for place in range(places)]
    assert len({len(indices) for _, indices in shares}) == 1 and len(shares[0][1]) % multiple == 0
    counted = [one for rows, _ in shares for one in rows if any(one.mask)]
    assert sorted(counted, key=lambda one: one.tokens[0]) == SAMPLES
    for rows, indices in shares:
        assert [i for micro in indices for i in micro] == list(range(len(rows)))
        for micro in indices:
            assert [rows[i] for i in micro] in micros or not any(any(rows[i].mask) for i in micro)


def test_fixed_sizes():
    args = SimpleNamespace(use_dynamic_batch_size=False, micro_batch_size=3)
    assert [len(micro) for micro in trainer._packed(args, SAMPLES)] == [3, 3, 1]
