"""Validation data as slime's trainer gets it, and how its microbatches are dealt out.

pytest tests/slime/hooks/test_slime_validation.py
"""

from __future__ import annotations

import sys
from argparse import Namespace
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


def test_the_mean_over_tokens_that_count_at_temperature_1(monkeypatch):
    """Sampling's temperature is none of the loss's; what the mask leaves out counts in neither sum."""
    import torch
    from megatron.core import mpu

    seen = []

    def forward_only(f, args, model, iterators, counts):
        seen.append((args.rollout_temperature, counts))
        (iterator,) = iterators
        rows = [i for micro in iterator.indices for i in micro]
        return {"log_probs": [-iterator.data["tokens"][i][-2:].float() for i in rows]}

    class DataIterator:
        def __init__(self, data, micro_batch_indices):
            self.data, self.indices = data, micro_batch_indices

    parts = {
        "cp_utils": {"slice_log_prob_with_cp": lambda mask, total, response: mask},
        "data": {"DataIterator": DataIterator},
        "loss": {"get_log_probs_and_entropy": None},
        "model": {"forward_only": forward_only},
    }
    for name in ("slime", "slime.backends", "slime.backends.megatron_utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, members in parts.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, f"slime.backends.megatron_utils.{name}", module)
    monkeypatch.setattr(trainer, "_places", lambda model: (0, 1, 1))
    monkeypatch.setattr(mpu, "is_pipeline_last_stage", lambda: True)
    monkeypatch.setattr(mpu, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(mpu, "get_virtual_pipeline_model_parallel_world_size", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    samples = [Given([9, 1, 2], 2, [1, 1]), Given([9, 5, 100], 2, [1, 0]), Given([9, 100, 4], 2, [0, 1])]
    args = Namespace(use_dynamic_batch_size=False, micro_batch_size=2, rollout_temperature=0.5)
    assert trainer.validation_loss(args, [], samples) == (1 + 2 + 5 + 4) / 4
    assert seen == [(1.0, [2])] and args.rollout_temperature == 0.5
