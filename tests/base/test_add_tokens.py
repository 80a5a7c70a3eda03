"""``slime-lora add-tokens``: transformers loads what it writes, and is the judge of it.

pytest tests/base/test_add_tokens.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slime_plugins.lora.base import grow
from slime_plugins.lora.base.tokens import token_ids
from slime_plugins.lora.cli import main
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.rehearsal.tiny import make_tiny, write_tokenizer

NEW = ["<item_1>", "<item_12>", "[act]"]
WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"t{i}" for i in range(4, 100))]


def checkpoint(path: Path, *, vocab: int = 100, tied: bool = True, family: str = "qwen3", **kwargs) -> Path:
    """A tiny base whose tokenizer knows 100 words, its embedding ``vocab`` rows."""
    make_tiny(path, family, vocab_size=vocab, tied=tied, tokenizer=False, **kwargs)
    write_tokenizer(path, WORDS, added=family == "qwen2")
    return path


def add(base: Path, out: Path, lines, *flags: str) -> int:
    file = out.with_suffix(".txt")
    file.write_text("\n".join(lines) + "\n")
    return main(["add-tokens", "--hf-checkpoint", str(base), "--tokens", str(file), "--out", str(out), *flags])


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}


def logits(path: Path, ids: list[int]) -> torch.Tensor:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def loaded_ids(path: Path, text: str) -> list[int]:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(path).encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    "family, tied, vocab, count",
    [
        ("qwen3", True, 100, 3),
        ("llama", False, 100, 3),
        ("qwen2", False, 160, 3),  # padded: the new ids lie inside
        ("qwen3", True, 160, 80),  # padded by less than there are new tokens
    ],
)
def test_transformers_reads_it(tmp_path, family, tied, vocab, count):
    base = checkpoint(tmp_path / "base", family=family, tied=tied, vocab=vocab, max_shard_size="40KB")
    new = [*NEW, *(f"<more_{i}>" for i in range(count - 3))]
    assert add(base, tmp_path / "out", new) == 0
    out, ids, rows = tmp_path / "out", list(range(100, 100 + count)), max(vocab, 100 + count)
    assert token_ids(out, new) == ids  # by the tokenizer: 100, whatever the number of rows
    assert json.loads((out / "config.json").read_text())["vocab_size"] == rows
    assert loaded_ids(out, "t5<item_12> <item_1>t7 [act]") == [5, 101, 100, 7, 102]
    old = [5, 9, 40, 99]
    before, after = logits(base, old), logits(out, old)
    assert after.shape[1] == rows and torch.equal(after[:, :100], before[:, :100])
    was, now = tensors(base), tensors(out)
    assert was.keys() == now.keys()
    matrices = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    for name in was:
        if name not in matrices:
            assert torch.equal(was[name], now[name])
            continue
        assert now[name].shape == (rows, 64) and torch.equal(now[name][:100], was[name][:100])
        torch.testing.assert_close(now[name][ids], was[name][:100].double().mean(0).float().expand(count, -1))
        untouched = [i for i in range(100, vocab) if i not in ids]
        assert torch.equal(now[name][untouched], was[name][untouched])
    assert logits(out, [100, 5, 101]).isfinite().all()


def test_as_resize_token_embeddings(tmp_path):
    """Without padding, the mean is transformers' own, which adds a little noise to it."""
    import transformers

    base = checkpoint(tmp_path / "base", tied=False)
    assert add(base, tmp_path / "out", NEW) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(103, mean_resizing=True)
    now = tensors(tmp_path / "out")
    for name, theirs in (("model.embed_tokens", model.get_input_embeddings()), ("lm_head", model.lm_head)):
        torch.testing.assert_close(now[f"{name}.weight"], theirs.weight.data, atol=1e-3, rtol=0)


def test_other_files_are_links(tmp_path, capsys, monkeypatch):
    base = checkpoint(tmp_path / "base", tied=False, max_shard_size="40KB")
    assert add(base, tmp_path / "out", NEW) == 0
    index = json.loads((base / "model.safetensors.index.json").read_text())
    grown = {index["weight_map"][name] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    files = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(files) > len(grown)
    for name in files:
        assert os.path.samefile(base / name, tmp_path / "out" / name) == (name not in grown)
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert not os.path.samefile(base / name, tmp_path / "out" / name)
    after = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert after["weight_map"] == index["weight_map"]
    assert after["metadata"]["total_size"] == sum(t.nbytes for t in tensors(tmp_path / "out").values())
    assert f"{len(files) - len(grown)} by hard link" in capsys.readouterr().out

    def refuse(*args, **kwargs):
        raise OSError(18, "another file system")

    monkeypatch.setattr(os, "link", refuse)
    assert add(base, tmp_path / "linked", NEW) == 0
    out = capsys.readouterr().out
    assert "by symbolic link" in out and "must stay where it is" in out
    assert logits(tmp_path / "linked", [5]).shape == (1, 103)
    monkeypatch.setattr(os, "symlink", refuse)
    assert add(base, tmp_path / "copied", NEW) == 0
    assert "by copy" in capsys.readouterr().out


def test_descriptions_and_given_rows(tmp_path, capsys):
    base = checkpoint(tmp_path / "base", tied=False, dtype=torch.bfloat16)
    was = tensors(base)
    lines = ["<a>\tt5 t6 t7", "<b>\tt9"]
    assert add(base, tmp_path / "described", lines) == 0
    assert "rows start as: description" in capsys.readouterr().out
    now = tensors(tmp_path / "described")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(now[name][100], was[name][[5, 6, 7]].double().mean(0).bfloat16())
        assert torch.equal(now[name][101], was[name][9])
    assert add(base, tmp_path / "mean", lines, "--init", "mean") == 0
    assert "descriptions not used: --init mean" in capsys.readouterr().out

    rows = {name: torch.randn(2, 64) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    save_file(rows, tmp_path / "rows.safetensors")
    assert add(base, tmp_path / "given", ["<a>", "<b>"], "--init", str(tmp_path / "rows.safetensors")) == 0
    now = tensors(tmp_path / "given")
    assert all(torch.equal(now[name][100:], rows[name].bfloat16()) for name in rows)


def test_older_tokenizer_files_are_kept_in_step(tmp_path):
    """``added_tokens_decoder``, as published bases have it, and ``added_tokens.json``."""
    base = checkpoint(tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    entry = {"content": "<pad>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config["added_tokens_decoder"] = {"0": {**entry, "special": True}}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    (base / "added_tokens.json").write_text('{"<pad>": 0}')
    assert add(base, tmp_path / "out", NEW) == 0
    after = json.loads((tmp_path / "out/tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert sorted(after) == ["0", "100", "101", "102"] and after["101"]["content"] == "<item_12>"
    assert json.loads((tmp_path / "out/added_tokens.json").read_text())["[act]"] == 102


def byte_level(path: Path, special: str) -> int:
    """Write a tokenizer as Qwen's: no unknown, a space belongs to the word after it. Returns how many tokens."""
    import transformers
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["a red ball and a blue box"] * 9, vocab_size=280, show_progress=False)
    trained.add_special_tokens([special])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token=special)
    fast.save_pretrained(path)
    return len(fast)


def test_byte_level_tokenizers(tmp_path):
    base = make_tiny(tmp_path / "base", "qwen2", vocab_size=320, tokenizer=False)
    count = byte_level(base, "<|endoftext|>")
    before = loaded_ids(base, "a red ball<|endoftext|> boxes")
    assert add(base, tmp_path / "out", ["<|item 7|>\ta red ball", "\u00e9toile\ta blue box"]) == 0
    out = tmp_path / "out"
    assert loaded_ids(out, "a red ball<|endoftext|> boxes") == before
    assert loaded_ids(out, "a<|item 7|>\u00e9toile") == [*loaded_ids(base, "a"), count, count + 1]
    was, now = (tensors(path)["model.embed_tokens.weight"] for path in (base, out))
    words = loaded_ids(base, "a red ball")
    assert len(words) > 1 and torch.equal(now[count], was[words].double().mean(0).float())
    assert now.shape == was.shape  # padded: 320 rows


def test_a_tokenizer_that_transformers_adds_to(tmp_path, capsys):
    """Of model type qwen2 it adds <|endoftext|> where tokenizer.json has none, with the id of the first new token."""
    base = make_tiny(tmp_path / "base", "qwen2", vocab_size=320, tokenizer=False)
    byte_level(base, "<|end|>")
    assert add(base, tmp_path / "out", NEW) == 1
    assert "transformers adds ['<|endoftext|>'] to its tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    "lines, flags, words",
    [
        ([], [], "holds no tokens"),
        (["<a>", "", "<b>"], [], "line 2 holds no token"),
        (["<a>", "<b>", "<a>"], [], "line 3: '<a>' is on line 1 already"),
        ([" <a>"], [], "has white space around it"),
        (["<a>", "<b>\r<c>"], [], "line 2: '<b>\\r<c>' has a control character in it"),
        (["<\0a\0>\0"], [], "'<\\x00a\\x00>\\x00' has a control character in it; save the file as UTF-8"),
        (["<a>\t"], [], "has a tab, no description"),
        (["<a>", "t7", "<pad>"], [], "has one token for 't7' (id 7), '<pad>' (id 0) already"),
        (["<a>\tt5", "<b>"], [], "'<b>' has no description and others have"),
        (["<a>"], ["--init", "description"], "'<a>' has none"),
        (["<a>\tt5 nonsense"], [], "holds words that the tokenizer does not know"),
        (["<a>"], ["--init", "median"], "expected mean, description, or a .safetensors file"),
    ],
)
def test_refused_in_one_line(tmp_path, capsys, lines, flags, words):
    base = checkpoint(tmp_path / "base")
    capsys.readouterr()  # transformers' progress bar
    assert add(base, tmp_path / "out", lines, *flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "rows, words",
    [
        ({"model.embed_tokens.weight": (2, 64)}, "expected a row per token, [3, 64]"),
        ({"embedding": (3, 64)}, "holds embedding; expected model.embed_tokens.weight"),
    ],
)
def test_given_rows_must_fit(tmp_path, capsys, rows, words):
    base = checkpoint(tmp_path / "base")
    save_file({name: torch.zeros(shape) for name, shape in rows.items()}, tmp_path / "rows.safetensors")
    assert add(base, tmp_path / "out", NEW, "--init", str(tmp_path / "rows.safetensors")) == 2
    assert words in capsys.readouterr().err


def test_bases_that_cannot_be(tmp_path, capsys):
    base = checkpoint(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "vocab_size": 99}))
    assert add(base, tmp_path / "out", NEW) == 1
    assert "has 100 rows, config.json's vocab_size is 99" in capsys.readouterr().err
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    assert add(base, tmp_path / "out", NEW) == 1
    assert "give the dense checkpoint" in capsys.readouterr().err
    (base / "config.json").write_text(json.dumps(config))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    assert add(base, tmp_path / "full", NEW) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    (base / "tokenizer.json").unlink()
    assert add(base, tmp_path / "out", NEW) == 1
    assert "tokenizer" in capsys.readouterr().err


def test_whole_or_not_at_all(tmp_path, capsys, monkeypatch):
    """A tokenizer that splits a token when it is read again is found before the directory is there."""
    base = checkpoint(tmp_path / "base")

    def split(path, tokens):
        assert token_ids(path, tokens) == [100, 101, 102]  # the new directory is finished
        raise UsageError(f"1 of 3 tokens are not one token of {path}: '<item_1>' is 2 pieces; add them with another")

    monkeypatch.setattr(grow, "token_ids", split)
    assert add(base, tmp_path / "out", NEW) == 1
    err = capsys.readouterr().err
    assert f"not one token of {base} with the new tokens: '<item_1>' is 2 pieces\n" in err
    assert not any(path.name.startswith((".out", "out")) and path.is_dir() for path in tmp_path.iterdir())


def test_token_ids(tmp_path):
    base = checkpoint(tmp_path / "base", vocab=160)
    assert token_ids(base, ["t7", "<unk>", "t99"]) == [7, 3, 99]
    with pytest.raises(
        UsageError, match=r"2 of 3 tokens are not one token of .*'t5 t6' is 2 pieces, '<x>' is unknown"
    ):
        token_ids(base, ["t7", "t5 t6", "<x>"])
    with pytest.raises(UsageError, match="'t7' and 't7' are both id 7"):
        token_ids(base, ["t7", "t7"])
    with pytest.raises(UsageError, match="no such directory"):
        token_ids(tmp_path / "nothing", ["t7"])
