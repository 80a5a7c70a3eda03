"""Which rows of a model's vocabulary train: the two matrices of a model, found, checked and given their form."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads as parallel_finalize
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.utils import get_model_config

from slime_plugins.lora.adapters import config_of, iter_token_rows
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.layers import FrozenLinear, TokenRows, adapt_rows, frozen_of
from slime_plugins.lora.layers.forms.tokens import FORMS, SUMS_STAGES
from slime_plugins.lora.parallel import chunks_of, model_parallel, unwrapped

EMBEDDING, HEAD = "embedding.word_embeddings", "output_layer"


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary matrices of this rank's chunks."""

    embedding: VocabParallelEmbedding | None
    head: ColumnParallelLinear | None
    """None too for a head that is no matrix over the vocabulary: a value head."""
    tied: bool
    size: int
    """Padded; 0 on a stage without either."""


NO_VOCABULARY = Vocabulary(None, None, False, 0)


def vocabulary_of(chunks: Sequence[torch.nn.Module]) -> Vocabulary:
    """Find them. Raises ValueError for one of a class that has no form with trained rows: it would not see them."""
    embedding: Any = None
    head: Any = None
    tied = False
    for chunk in map(unwrapped, chunks):
        for name, module in chunk.named_modules():
            if name == EMBEDDING or name.endswith(f".{EMBEDDING}"):
                embedding = module
            if name == HEAD or name.endswith(f".{HEAD}"):
                head = module
            tied = tied or bool(getattr(module, "share_embeddings_and_output_weights", False))
    if getattr(head, "out_features", None) == 1:
        head = None
    for name, module in ((EMBEDDING, embedding), (HEAD, head)):
        if module is not None and type(module) not in FORMS:
            raise ValueError(f"{name} is a {type(module).__name__}, for which trained rows have no form")
    size = embedding.num_embeddings if embedding is not None else head.output_size if head is not None else 0
    return Vocabulary(embedding, head, tied, size)


def check_ids(ids: Sequence[int], vocabulary: Vocabulary, chunks: Sequence[torch.nn.Module]) -> None:
    """Raise UsageError for rows that this stage cannot train."""
    outside = [i for i in ids if vocabulary.size and not 0 <= i < vocabulary.size]
    if outside:
        raise UsageError(
            f"--trainable-token-indices: {outside[0]} is outside of the model's {vocabulary.size:,} rows; add the "
            "tokens to the base first (slime-lora add-tokens)"
        )
    if ids and model_parallel() and parallel_state.get_tensor_model_parallel_world_size() > 1 and not _averages():
        raise UsageError(
            "--trainable-token-indices over tensor-parallel ranks: this Megatron-Core does not know "
            "average_gradients_across_tp_domain, by which it sums their gradients; use a newer one, or "
            "tensor-parallel size 1"
        )
    for chunk in chunks:
        if any(name.startswith("mtp.") for name, _ in unwrapped(chunk).named_modules()):
            raise UsageError(
                "--trainable-token-indices with multi-token prediction: its second use of the embedding, on another "
                "stage, is not kept equal; train without --mtp-num-layers"
            )


def _averages() -> bool:
    """Does Megatron's ``finalize_model_grads`` average what is marked so? An older one would pass over the mark."""
    finalize = sys.modules[parallel_finalize.__module__]
    return "average_gradients_across_tp_domain" in inspect.getsource(finalize)


def add_token_rows(vocabulary: Vocabulary, ids: Sequence[int], dtype: torch.dtype | None) -> list[TokenRows]:
    """Let these rows train. Returns what carries them on this rank."""
    index = torch.tensor(ids, dtype=torch.int64)
    options: dict[str, Any] = {"vocab_size": vocabulary.size, "dtype": dtype}
    several = model_parallel() and parallel_state.get_pipeline_model_parallel_world_size() > 1
    found, owner = [], None
    if vocabulary.embedding is not None:
        base = _frozen(vocabulary.embedding)
        first = vocabulary.embedding.vocab_start_index
        owner = adapt_rows(vocabulary.embedding, index, base, name=EMBEDDING, first=first, **options)
        found.append(owner)
    if vocabulary.head is not None:
        owner = owner if vocabulary.tied else None
        base = _frozen(vocabulary.head) if owner is None else owner.lora_base
        first = base.tp_group.rank() * base.shape[0]
        copy = vocabulary.tied and owner is None
        name = EMBEDDING if vocabulary.tied else HEAD
        found.append(
            adapt_rows(vocabulary.head, index, base, name=name, first=first, owner=owner, copy=copy, **options)
        )
    for carrier in found:
        for parameter in carrier.lora_parameters().values():
            parameter.shared_embedding = several and vocabulary.tied  # type: ignore[attr-defined]
    return found


def sum_over_stages(model: Any) -> None:
    """Let a model's own ``finalize_model_grads_func`` sum tied rows, where there are any."""
    if not config_of(model).trainable_token_indices:
        return
    for chunk in chunks_of(model):
        parameters = (p for rows in iter_token_rows(chunk) for p in rows.lora_parameters().values())
        if any(getattr(parameter, "shared_embedding", False) for parameter in parameters):
            config: Any = get_model_config(chunk)
            config.finalize_model_grads_func = summing_stages(config.finalize_model_grads_func)


def _frozen(matrix: torch.nn.Module) -> FrozenLinear:
    return FrozenLinear(matrix, "column", frozen_of)  # type: ignore[arg-type]


def summing_stages(finalize: Callable) -> Callable:
    """``finalize_model_grads`` that also sums the gradients of tied rows over the first and the last stage.

    For ``config.finalize_model_grads_func`` of a model with trained rows, tied weights and pipeline parallelism; of
    any other model it does nothing more.
    """
    if hasattr(finalize, SUMS_STAGES):
        return finalize

    @functools.wraps(finalize)
    def hooked(model, *args, **kwargs):
        result = finalize(model, *args, **kwargs)
        for carrier in iter_token_rows(chunks_of(model)):
            parameter: Any
            for parameter in carrier.lora_parameters().values():
                if getattr(parameter, "shared_embedding", False):
                    dist.all_reduce(parameter.main_grad, group=parallel_state.get_embedding_group())
        return result

    setattr(hooked, SUMS_STAGES, True)
    return hooked
