"""Prompts and responses as tokens, and whether they fit; the same before a run as in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slime_plugins.lora.errors import UsageError


class Encoder:
    """A checkpoint's tokenizer as AutoTokenizer reads it."""

    def __init__(self, tokenizer: Any, path: str | Path, *, apply_chat_template: bool, max_positions: int):
        """``max_positions``: tokens that the model has positions for."""
        self.tokenizer, self._path = tokenizer, path
        self._apply_chat_template, self._max_positions = apply_chat_template, max_positions

    @classmethod
    def read(cls, path: str | Path, *, apply_chat_template: bool, max_positions: int) -> Encoder:
        """Raises ValueError if AutoTokenizer cannot read the directory."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        except Exception as error:  # it raises many kinds
            raise ValueError(f"{path}: its tokenizer cannot be read: {type(error).__name__}: {error}") from error
        return cls(tokenizer, path, apply_chat_template=apply_chat_template, max_positions=max_positions)

    @property
    def template_unused(self) -> bool:
        """Has the tokenizer a chat template that text prompts are not put through?"""
        return bool(self.tokenizer.chat_template) and not self._apply_chat_template

    def prompts(self, prompts: Sequence[str | list], *, room: int) -> list[list[int]]:
        """Token ids. Messages, and text with ``apply_chat_template``, go through the chat template.

        Args:
            room: tokens that each prompt must leave for the response.
        Raises:
            UsageError: a chat template is asked for, and there is none.
            ValueError: a prompt without a token, and one that leaves no room for the response.
        """
        encoded = self._encoded(prompts)
        longest = max(len(ids) for ids in encoded)
        if longest + room > self._max_positions:
            raise ValueError(
                f"a prompt of {longest} tokens and --rollout-max-response-len {room} exceed this model's "
                f"{self._max_positions} positions"
            )
        return encoded

    def pairs(
        self, prompts: Sequence[str | list], responses: Sequence[str], end: int
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of prompts and of given responses, each followed by the end token.

        Raises:
            UsageError, ValueError: as ``prompts``; and for a pair that is too long.
        """
        encoded = self._encoded(prompts)
        ends = [[*self.tokenizer(response, add_special_tokens=False).input_ids, end] for response in responses]
        for prompt, response in zip(encoded, ends):
            if len(prompt) + len(response) > self._max_positions:
                raise ValueError(
                    f"a prompt of {len(prompt)} tokens and a response of {len(response)} exceed this model's "
                    f"{self._max_positions} positions"
                )
        return encoded, ends

    def _encoded(self, prompts: Sequence[str | list]) -> list[list[int]]:
        encoded = [self._prompt(prompt) for prompt in prompts]
        if [] in encoded:
            raise ValueError(
                f"{type(self.tokenizer).__name__} makes no token of the prompt {prompts[encoded.index([])]!r}; is it "
                "empty, or is the checkpoint's tokenizer.json not that of this model_type?"
            )
        return encoded

    def _prompt(self, prompt: str | list) -> list[int]:
        if isinstance(prompt, str) and not self._apply_chat_template:
            return self.tokenizer(prompt).input_ids
        if not self.tokenizer.chat_template:
            what = "--apply-chat-template" if self._apply_chat_template else "prompts that are lists of messages"
            raise UsageError(f"{what}: the tokenizer of {self._path} has no chat template; give prompts as plain text")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # jinja's, and what templates raise themselves
            raise ValueError(
                f"the chat template of {self._path} refuses {messages!r}: {type(error).__name__}: {error}"
            ) from error
        return self.tokenizer(text, add_special_tokens=False).input_ids


def to_look_at(prompts: Sequence[Any], most: int = 1024) -> list[Any]:
    """Those of many prompts whose tokens are worth counting beforehand: the longest and the shortest texts."""
    if len(prompts) <= most:
        return list(prompts)
    ordered = sorted(prompts, key=lambda item: len(str(item.prompt)) + len(item.response))
    return ordered[-most // 2 :] + ordered[: most // 2]
