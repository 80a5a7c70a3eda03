"""The output layer of a Megatron model, where an objective reads hidden states with it in place of logits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def output_weight(chunk: Any) -> torch.Tensor:
    """This rank's rows of its weight, [V/T, H], detached. ``chunk``: unwrapped, of the last stage."""
    tied = chunk.share_embeddings_and_output_weights
    return (chunk.shared_embedding_or_output_weight() if tied else chunk.output_layer.weight).detach()


@contextlib.contextmanager
def without_head(chunk: Any) -> Iterator[None]:
    """Inside, the model gives its final hidden states [N, S (/T under SP), H] in place of logits.

    ``chunk``: unwrapped; on a stage without an output layer nothing is done.
    """
    layer = getattr(chunk, "output_layer", None)
    if layer is None:
        yield
        return
    own = layer.__dict__.get("forward")
    layer.forward = lambda hidden, *args, **options: (hidden, None)
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own
