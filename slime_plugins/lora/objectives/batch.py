"""Samples in rows: prompt, response, padding; and whatever an objective needs to know of each.

Shape letters, here and in all objectives: N samples, S tokens of a padded sequence, V vocabulary, T tensor-parallel
ranks. ``mask`` is 1 on response tokens, 0 elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Batch:
    """Samples, prompt and response in one row, padded on the right."""

    tokens: torch.Tensor
    """int64 [N, S]."""
    mask: torch.Tensor
    """float32 [N, S]: position t is 1 if token t is part of the response. Never 1 at t = 0."""
    fields: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Tensors [N, ...] by name, cut and moved as the samples are."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> Batch:
        return self._map(lambda value: value[rows])

    def lengths(self) -> torch.Tensor:
        """int64 [N]: tokens of prompt and response, without padding."""
        positions = torch.arange(self.tokens.shape[1])
        return ((positions + 1) * (self.mask > 0)).amax(1)

    def to(self, device: torch.device) -> Batch:
        return self._map(lambda value: value.to(device))

    def having(self, **fields: torch.Tensor) -> Batch:
        """The same samples with more fields."""
        return Batch(self.tokens, self.mask, {**self.fields, **fields})

    def _map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return Batch(fn(self.tokens), fn(self.mask), {name: fn(value) for name, value in self.fields.items()})


def make_batch(
    prompts: list[list[int]], responses: list[list[int]], *, multiple: int, **fields: torch.Tensor
) -> Batch:
    """Pad token lists to one length, a multiple of ``multiple`` (sequence parallelism cuts it into equal pieces)."""
    longest = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    size = -(-longest // multiple) * multiple
    tokens = torch.zeros(len(prompts), size, dtype=torch.int64)  # what pads does not matter: attention is causal
    mask = torch.zeros(len(prompts), size)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        tokens[row, :end] = torch.tensor(prompt + response)
        mask[row, len(prompt) : end] = 1.0
    return Batch(tokens, mask, fields)


def with_token_weight(batch: Batch) -> Batch:
    """``token_weight`` [N]: with it, a mean over samples is the mean over all of the batch's response tokens.

    So a long response weighs as its tokens do, however ranks and microbatches cut the samples.
    """
    weight = len(batch) / batch.mask.sum()
    return batch.having(token_weight=weight.expand(len(batch)))
