"""Tokens as strings and as ids. The tokenizer decides, never the number of rows: vocabularies are padded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.files.regular import read_small

_LISTED = 4


@dataclass(frozen=True)
class NewToken:
    """One line of a token file."""

    text: str
    description: str | None = None
    """What follows a tab: words whose rows the token starts from."""


def runs(ids: Iterable[int]) -> list[range]:
    """The same ids, in the same order, as runs of consecutive ones."""
    found: list[range] = []
    for i in ids:
        if found and found[-1].stop == i:
            found[-1] = range(found[-1].start, i + 1)
        else:
            found.append(range(i, i + 1))
    return found


def read_tokens(path: str | os.PathLike) -> list[NewToken]:
    """Read a file with one token a line, or ``token<TAB>description``.

    Raises:
        OSError: it cannot be read.
        UsageError: naming the line: no token, white space around it, a control character in it, a tab without a
            description, or a token that was there before; a file without tokens, or one that is no UTF-8.
    """
    try:
        text = read_small(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}; expected one token a line") from None
    lines = text.removesuffix("\n").split("\n")
    if not text.strip():
        raise UsageError(f"{path}: holds no tokens; expected one a line")
    seen: dict[str, int] = {}
    found = []
    for number, line in enumerate(lines, 1):
        token, tab, description = line.removesuffix("\r").partition("\t")
        if not token.strip():
            raise UsageError(f"{path}: line {number} holds no token; drop it")
        if token != token.strip():
            raise UsageError(f"{path}: line {number}: {token!r:.80} has white space around it; drop that")
        if any(ord(character) < 32 or ord(character) == 127 for character in token):
            raise UsageError(
                f"{path}: line {number}: {token!r:.80} has a control character in it; save the file as UTF-8 with one "
                "token a line"
            )
        if tab and not description.strip():
            raise UsageError(
                f"{path}: line {number}: {token!r:.80} has a tab, no description; add it, or drop the tab"
            )
        if token in seen:
            raise UsageError(f"{path}: line {number}: {token!r:.80} is on line {seen[token]} already; drop one")
        seen[token] = number
        found.append(NewToken(token, description.strip() if tab else None))
    return found


def load_tokenizer(hf_checkpoint: str | os.PathLike) -> Any:
    """The tokenizer of a directory, as transformers reads it. Raises ValueError where it cannot."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(os.fspath(hf_checkpoint), local_files_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{hf_checkpoint}: transformers cannot read its tokenizer: {reason:.200}") from error


def pieces(tokenizer: Any, text: str) -> list[int]:
    """The ids that a text becomes, without the special ones around it."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def is_one_token(tokenizer: Any, text: str) -> bool:
    """Does the tokenizer make one id of it, and one that is not for anything unknown?"""
    ids = pieces(tokenizer, text)
    return len(ids) == 1 and (ids[0] != tokenizer.unk_token_id or text == tokenizer.unk_token)


def token_ids(hf_checkpoint: str | os.PathLike, tokens: Sequence[str]) -> list[int]:
    """Ids of tokens, by the tokenizer of a checkpoint, in the order given.

    Raises:
        UsageError: a token that the tokenizer splits or does not know, or two with one id.
        ValueError: the directory has no tokenizer that can be read.
    """
    if not Path(hf_checkpoint).is_dir():
        raise UsageError(f"{hf_checkpoint}: no such directory; expected a Hugging Face checkpoint")
    tokenizer = load_tokenizer(hf_checkpoint)
    split = [token for token in tokens if not is_one_token(tokenizer, token)]
    if split:
        raise UsageError(
            f"{len(split)} of {len(tokens)} tokens are not one token of {hf_checkpoint}: {_told(tokenizer, split)}; "
            "add them with `slime-lora add-tokens` and give the directory that it writes"
        )
    ids = [pieces(tokenizer, token)[0] for token in tokens]
    first: dict[int, str] = {}
    for number, token in zip(ids, tokens):
        if number in first:
            both = f"{first[number]!r:.60} and {token!r:.60}"
            raise UsageError(f"{both} are both id {number} of {hf_checkpoint}; give each token once")
        first[number] = token
    return ids


def _told(tokenizer: Any, tokens: list[str]) -> str:
    """Each of the first few with what it is split into."""
    told = []
    for token in tokens[:_LISTED]:
        ids = pieces(tokenizer, token)
        unknown = not ids or ids == [tokenizer.unk_token_id]
        told.append(f"{token!r:.60} is {'unknown' if unknown else f'{len(ids)} pieces'}")
    return ", ".join(told) + (f" and {len(tokens) - _LISTED} more" if len(tokens) > _LISTED else "")
