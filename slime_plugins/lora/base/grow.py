"""A copy of a checkpoint with more tokens: rows of embedding and head, tokenizer and config; the rest is linked."""

from __future__ import annotations

import copy
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slime_plugins.lora.base.checkpoint import INDEX, MERGEABLE, BaseCheckpoint
from slime_plugins.lora.base.rewrite import check_empty, copy_others, link
from slime_plugins.lora.base.tokens import NewToken, is_one_token, load_tokenizer, pieces, token_ids
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.files.atomic import replaced_directory
from slime_plugins.lora.files.json_text import read_object
from slime_plugins.lora.files.safetensors import Stored, header_of, read_header, torch_dtype

MEAN, DESCRIPTION = "mean", "description"
_TOKENIZER = "tokenizer.json"
_ROWS = 8192
"""That are summed at a time, in float64."""
_AS_IS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
"""How a token is found: anywhere, exactly, and kept by ``skip_special_tokens``."""


@dataclass(frozen=True)
class Added:
    """What ``add_tokens`` has done."""

    ids: list[int]
    rows_before: int
    """Of the embedding."""
    rows_after: int
    init: str
    matrices: list[str]
    """Names of the tensors that have new rows."""
    links: dict[str, int]
    """``hard link``, ``symbolic link`` or ``copy`` -> number of weight files."""


def add_tokens(
    hf_checkpoint: str | os.PathLike,
    tokens: Sequence[NewToken],
    out_dir: str | os.PathLike,
    *,
    init: str | None = None,
) -> Added:
    """Write a checkpoint that knows ``tokens``, whole or not at all.

    The tokenizer gives the ids. Rows that the base has for no token (a padded vocabulary) are used first: those new
    tokens overwrite rows, and embedding and head grow by what is left.

    Args:
        init: ``mean`` (of the rows of all tokens that the tokenizer knew), ``description`` (of the tokens that a
            description is made of), or a safetensors file with rows in the order of ``tokens``, named as the tensors
            they go into. None: ``description`` where every token has one, ``mean`` where none has.
    Raises:
        UsageError: tokens that exist, an init that does not fit them, ``out_dir`` holds something.
        ValueError, OSError: a base that is damaged, without a tokenizer.json, or with an embedding that is no plain
            matrix; a tokenizer that splits a token all the same.
    """
    base, out = BaseCheckpoint.of(hf_checkpoint), Path(out_dir)
    check_empty(out)
    names = _matrices(base)
    rows = base.weights[names[0]].shape[0]
    tokenizer = load_tokenizer(base.directory)
    grown = _grown_tokenizer(base, tokenizer, tokens, rows)
    ids = [grown.token_to_id(token.text) for token in tokens]
    _check_ids(base, ids, tokenizer.get_vocab(), rows)
    known = sorted(set(tokenizer.get_vocab().values()))
    start = _Start(base, names, tokenizer, tokens, known, _init_of(tokens, init))
    size, links = max(rows, max(ids) + 1), Counter[str]()
    with replaced_directory(out, drop=()) as new:
        copy_others(base, new)
        grown.save(str(new / _TOKENIZER))
        _note_tokens(new, tokens, ids)
        _note_size(base, new, rows, size)
        for file in base.files:
            held = {name: w for name, w in base.weights.items() if w.file == file}
            if held.keys().isdisjoint(names):
                links[link(file, new / file.name)] += 1
            else:
                _write(new / file.name, held, {name: start.rows(name) for name in held if name in names}, ids, size)
        _note_index(base, new)
        _check(base, new, tokenizer, tokens, ids)
    return Added(ids, rows, size, start.init, names, dict(links))


def _matrices(base: BaseCheckpoint) -> list[str]:
    """Embedding first; then the head, where it is stored."""
    if base.coded or base.quantised:
        raise ValueError(f"{base.directory}: its weights are quantised; give the dense checkpoint")
    if base.embedding not in base.weights:
        raise ValueError(f"{base.directory}: has no {base.embedding}; expected a language model")
    heads = [name for name in base.weights if name.endswith("lm_head.weight")]
    if not heads and not base.tied:
        raise ValueError(f"{base.directory}: has no lm_head.weight, and config.json does not tie it to the embedding")
    if any(name.endswith("lm_head.bias") for name in base.weights):
        raise ValueError(f"{base.directory}: its head has a bias, which is not known here")
    names, size = [base.embedding, *heads], base.text_config.get("vocab_size", base.config.get("vocab_size"))
    for name in names:
        weight = base.weights[name]
        if len(weight.shape) != 2 or weight.dtype not in MERGEABLE:
            form = f"{weight.dtype} {list(weight.shape)}"
            raise ValueError(f"{base.directory}: {name} is {form}; expected a matrix of {', '.join(MERGEABLE)}")
        if weight.shape[0] != size:
            found = f"{name} has {weight.shape[0]} rows, config.json's vocab_size is {size!r}"
            raise ValueError(f"{base.directory}: {found}")
    return names


def _grown_tokenizer(base: BaseCheckpoint, tokenizer: Any, tokens: Sequence[NewToken], rows: int) -> Any:
    """tokenizer.json with the tokens; it gives them their ids."""
    from tokenizers import AddedToken, Tokenizer

    file = base.directory / _TOKENIZER
    if not file.is_file():
        raise ValueError(f"{base.directory}: has no {_TOKENIZER}; save its tokenizer as a fast one first")
    there = [token.text for token in tokens if is_one_token(tokenizer, token.text)]
    there += [t.text for t in tokens if t.text in tokenizer.get_vocab() and t.text not in there]
    if there:
        more = f" and {len(there) - 4} more" if len(there) > 4 else ""
        listed = ", ".join(f"{text!r:.60} (id {tokenizer.convert_tokens_to_ids(text)})" for text in there[:4])
        raise UsageError(f"{base.directory} has one token for {listed}{more} already; drop them from the file")
    grown = Tokenizer.from_file(str(file))
    grown.add_tokens([AddedToken(token.text, **_AS_IS) for token in tokens])
    return grown


def _check_ids(base: BaseCheckpoint, ids: list[int], vocabulary: dict[str, int], rows: int) -> None:
    last, number = max(vocabulary.items(), key=lambda item: item[1])
    if number >= rows:
        raise ValueError(f"{base.directory}: its tokenizer has id {number} ({last!r:.60}), its embedding {rows} rows")
    taken = [text for text, number in vocabulary.items() if number in set(ids)]
    if taken or len(set(ids)) < len(ids):
        raise ValueError(
            f"{base.directory}: transformers adds {taken[:1]} to its tokenizer, which {_TOKENIZER} has not; load it "
            "with AutoTokenizer and save_pretrained it there first"
        )


def _init_of(tokens: Sequence[NewToken], init: str | None) -> str:
    described = [token.description is not None for token in tokens]
    if init is None and any(described) and not all(described):
        bare = tokens[described.index(False)].text
        raise UsageError(f"{bare!r:.80} has no description and others have; describe all, or say --init mean")
    init = init or (DESCRIPTION if all(described) else MEAN)
    if init == DESCRIPTION and not all(described):
        bare = tokens[described.index(False)].text
        raise UsageError(f"--init description: {bare!r:.80} has none; expected token<TAB>description on every line")
    return init


class _Start:
    """Initial rows."""

    def __init__(
        self,
        base: BaseCheckpoint,
        names: list[str],
        tokenizer: Any,
        tokens: Sequence[NewToken],
        known: list[int],
        init: str,
    ) -> None:
        self.base, self.names, self.init, self.known, self.count = base, names, init, known, len(tokens)
        self.described: list[list[int]] = []
        self.given: dict[str, Stored] = {}
        if init == DESCRIPTION:
            self.described = [_words(tokenizer, token) for token in tokens]
        elif init != MEAN:
            self.given = self._given(init)

    def rows(self, name: str) -> torch.Tensor:
        """Of one matrix, [tokens, hidden], in its dtype."""
        if self.given:
            return self.given[self._source(name)].read().to(torch_dtype(self.base.weights[name].dtype))
        weight = self.base.weights[self._source(name)].read()
        if self.described:
            found = torch.stack([weight[ids].double().mean(0) for ids in self.described])
        else:
            parts = torch.tensor(self.known).split(_ROWS)
            mean = sum((weight[part].double().sum(0) for part in parts), torch.zeros(weight.shape[1]).double())
            found = (mean / len(self.known)).expand(self.count, -1)
        return found.to(weight.dtype)

    def _source(self, name: str) -> str:
        """A tied head that is stored all the same has the embedding's rows."""
        return self.names[0] if self.base.tied else name

    def _given(self, file: str) -> dict[str, Stored]:
        tensors = read_header(file).tensors
        wanted = {self._source(name) for name in self.names}
        if tensors.keys() != wanted:
            raise UsageError(f"{file}: holds {', '.join(tensors) or 'nothing'}; expected {', '.join(sorted(wanted))}")
        for name, stored in tensors.items():
            shape = (self.count, self.base.weights[name].shape[1])
            if stored.shape != shape or stored.dtype not in MERGEABLE:
                found = f"{stored.dtype} {list(stored.shape)}"
                raise UsageError(f"{file}: {name} is {found}; expected a row per token, {list(shape)}")
            if not torch.isfinite(stored.read()).all():
                raise ValueError(f"{file}: {name} holds values that are not finite")
        return tensors


def _words(tokenizer: Any, token: NewToken) -> list[int]:
    ids = pieces(tokenizer, token.description or "")
    if not ids or tokenizer.unk_token_id in ids:
        raise UsageError(
            f"the description of {token.text!r:.60} holds words that the tokenizer does not know: "
            f"{token.description!r:.80}; use others"
        )
    return ids


def _write(path: Path, held: dict[str, Stored], rows: dict[str, torch.Tensor], ids: list[int], size: int) -> None:
    """A safetensors file of the tensors ``held``, in their order, some with these rows at these ids."""
    held = dict(sorted(held.items(), key=lambda item: item[1].start))
    shapes = {name: (size, *w.shape[1:]) if name in rows else w.shape for name, w in held.items()}
    with open(path, "wb") as target:
        target.write(header_of({name: (w.dtype, shapes[name]) for name, w in held.items()}))
        for name, weight in held.items():
            if name not in rows:
                _stream(weight, target)
                continue
            before = weight.read()
            after = before.new_zeros(shapes[name])
            after[: len(before)] = before
            after[ids] = rows[name]
            target.write(after.view(torch.uint8).numpy().data)


def _stream(weight: Stored, target) -> None:
    with weight.open() as source:
        source.seek(weight.start)
        left = weight.end - weight.start
        while left > 0:
            data = source.read(min(left, 1 << 24))
            if not data:
                raise ValueError(f"{weight.file}: was cut while it was read")
            target.write(data)
            left -= len(data)


def _note_tokens(new: Path, tokens: Sequence[NewToken], ids: list[int]) -> None:
    """Beside tokenizer.json, where such a file or entry is there already."""
    entries = dict(zip((token.text for token in tokens), ids))
    old = new / "added_tokens.json"
    if old.exists():
        _write_json(old, read_object(old) | entries)
    path = new / "tokenizer_config.json"
    config = read_object(path) if path.exists() else {}
    if isinstance(config.get("added_tokens_decoder"), dict):
        config["added_tokens_decoder"] |= {str(n): {"content": text, **_AS_IS} for text, n in entries.items()}
        _write_json(path, config)


def _note_size(base: BaseCheckpoint, new: Path, rows: int, size: int) -> None:
    config = copy.deepcopy(base.config)
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and part.get("vocab_size") == rows:
            part["vocab_size"] = size
    _write_json(new / "config.json", config)


def _note_index(base: BaseCheckpoint, new: Path) -> None:
    """The index's sums, where it has them."""
    path = new / INDEX
    if not path.exists():
        return
    index, after = read_object(path), BaseCheckpoint(new)
    metadata = index.get("metadata")
    if isinstance(metadata, dict):
        if "total_size" in metadata:
            metadata["total_size"] = sum(w.end - w.start for w in after.weights.values())
        if "total_parameters" in metadata:
            metadata["total_parameters"] += _parameters(after) - _parameters(base)
    _write_json(path, index)


def _parameters(checkpoint: BaseCheckpoint) -> int:
    return sum(math.prod(weight.shape) for weight in checkpoint.weights.values())


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def _check(base: BaseCheckpoint, new: Path, before: Any, tokens: Sequence[NewToken], ids: list[int]) -> None:
    """What readers will find: every new token is its id, every old one is what it was."""
    try:
        found = token_ids(new, [token.text for token in tokens])
    except UsageError as error:
        told = str(error).partition("; add")[0].replace(str(new), f"{base.directory} with the new tokens")
        raise ValueError(told) from None
    after = load_tokenizer(new).get_vocab()
    changed = [text for text, number in before.get_vocab().items() if after.get(text) != number]
    if found != ids or changed:
        what = f"{changed[0]!r:.60} is another id" if changed else "new tokens are other ids"
        raise ValueError(f"{base.directory}: its tokenizer takes no new tokens: when it is read again, {what}")
