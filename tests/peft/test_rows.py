"""Trained vocabulary rows in an adapter's files: what is wrong with them is said by ``verify``, and not imported.

Run: python -m pytest tests/peft/test_rows.py
"""

from __future__ import annotations

import json

import adapter_dirs
import pytest
import torch
from safetensors.torch import load_file, save_file

from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.peft.directory import write_adapter
from slime_plugins.lora.peft.rows import VocabularyRows, rows_in, with_rows, written
from slime_plugins.lora.peft.verify import verify_adapter

IDS = (2, 7)
KEY = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.fixture
def base(tmp_path):
    config = '{"num_hidden_layers": 2, "tie_word_embeddings": true}'
    return BaseCheckpoint(adapter_dirs.base_checkpoint(tmp_path / "base", config=config))


@pytest.fixture
def adapter(base, tmp_path):
    """A directory that is right; D is 1 everywhere."""
    rows = [VocabularyRows("embed_tokens", IDS, torch.ones(2, adapter_dirs.HIDDEN))]
    write_adapter(tmp_path / "a", *with_rows(adapter_dirs.adapter(), rows, base), base=base.directory)
    return tmp_path / "a"


def spoil(adapter, change) -> None:
    """Change config and tensors, as another tool would: nothing of ours that notes what they were."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(config, tensors)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})


def test_a_good_one(adapter, base):
    report = verify_adapter(adapter, base.directory)
    assert report.ok, report.problems
    config, tensors = (
        json.loads((adapter / "adapter_config.json").read_text()),
        load_file(adapter / "adapter_model.safetensors"),
    )
    [rows] = rows_in(config, tensors, base)
    assert rows.ids == IDS
    torch.testing.assert_close(rows.delta, torch.ones(2, adapter_dirs.HIDDEN))


def test_all_other_rows_keep_their_bits(base):
    rows = [VocabularyRows("embed_tokens", IDS, torch.ones(2, adapter_dirs.HIDDEN))]
    change, names = written(rows, base)
    weight = base.weights[base.embedding].read()
    after = change(base.embedding, weight)
    changed = (after != weight).any(1).nonzero().flatten().tolist()
    assert changed == list(IDS) and names == {base.embedding}
    assert change("model.norm.weight", weight) is weight


SPOILT = [
    (lambda config, tensors: tensors.pop(KEY), "rows of embed_tokens are trained, and the adapter holds none"),
    (lambda config, tensors: config.pop("trainable_token_indices"), "rows that adapter_config.json does not name"),
    (lambda config, tensors: tensors.update({KEY: tensors[KEY][:1].clone()}), "holds 1 rows of 2 tokens"),
    (lambda config, tensors: tensors[KEY].fill_(float("nan")), "finite"),
    (lambda config, tensors: config.update(trainable_token_indices=[2, 11]), "has 11 rows, none for token 11"),
    (
        lambda config, tensors: config.update(trainable_token_indices=[2, 2]),
        "expected ids that are whole and each once",
    ),
    (lambda config, tensors: tensors.update({KEY: tensors[KEY][:, :5].clone()}), "expected finite values, [2, 8]"),
]


@pytest.mark.parametrize("change, words", SPOILT, ids=[words.replace(" ", "-") for _, words in SPOILT])
def test_verify_names_what_is_wrong(adapter, base, change, words):
    spoil(adapter, change)
    report = verify_adapter(adapter, base.directory)
    assert not report.ok and any(words in problem.message for problem in report.problems), report.problems


def test_rows_that_never_trained(base, tmp_path):
    """Alone they are the base: an adapter that does nothing."""
    rows = [VocabularyRows("embed_tokens", IDS, torch.zeros(2, adapter_dirs.HIDDEN))]
    write_adapter(tmp_path / "a", *with_rows(None, rows, base), base=base.directory)
    report = verify_adapter(tmp_path / "a", base.directory)
    assert any("it was never trained" in problem.message for problem in report.problems)
