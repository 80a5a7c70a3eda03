"""Trained rows of a frozen vocabulary: forms of Megatron's embedding and output layer.

Row i of the base is W[ids[i]]; what trains is the change of it, ``lora_rows`` D [N, H], whole on every
tensor-parallel rank and zero at the start. So nothing depends on when the base is loaded, adapters off is the base,
and the merged weight is W + D in those rows and W elsewhere. PEFT's ``trainable_token_indices`` hold W[ids] + D
(``peft.tuners.trainable_tokens``).

    embedding       y[t] += D[i] where token t is ids[i]
    output layer    logits[:, ids[i]] += x D[i]     of the columns that this rank holds

A rank's gradient of D covers its own tokens (an embedding under sequence parallelism) or its own columns (the output
layer): a part of the sum. Or it covers all of it, the same on every rank (an embedding without). Megatron averages it
over tensor-parallel ranks, so parts are multiplied by their number.

Tied weights: D is the embedding's, and the output layer of the same rank reads it there. On a last pipeline stage of
its own it has a copy, and ``tokens.summing_stages`` makes the two gradients one.
"""

from __future__ import annotations

import contextlib

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)

from slime_plugins.lora.layers.carrier import Carrier, install
from slime_plugins.lora.layers.frozen import FrozenLinear
from slime_plugins.lora.layers.pieces import Piece, Placement
from slime_plugins.lora.parameters import AdapterParameter, token_rows
from slime_plugins.lora.projections import Rounding, merge

SUMS_STAGES = "_lora_sums_stages"
"""Mark on a ``finalize_model_grads`` that sums the gradients of tied rows over the first and the last stage."""


class TokenRows(Carrier):
    """Mixin in front of an embedding or an output layer, some of whose rows train.

    Attributes:
        lora_name: ``embedding.word_embeddings`` or ``output_layer``; of tied rows always the former.
        lora_base: the frozen weight, as a column-parallel matrix [V/T, H].
        lora_rows: D [N, H]; absent where ``lora_owner`` has it.
        lora_owner: the embedding that the output layer of the same rank shares D with; else the module itself.
        lora_slots: int64 [V], position in ``ids`` of every vocabulary id, -1 for frozen ones.
        lora_here: int64, positions in ``ids`` of the rows that this rank's weight holds.
        lora_columns: int64, rows of this rank's weight that they are.
        lora_copy: is it the last stage's copy of tied rows?
    """

    lora_name: str
    lora_base: FrozenLinear
    lora_rows: torch.nn.Parameter
    lora_slots: torch.Tensor
    lora_here: torch.Tensor
    lora_columns: torch.Tensor
    lora_copy: bool

    @property
    def lora_delta(self) -> torch.Tensor:
        """D [N, H]."""
        return self.__dict__["lora_owner"].lora_rows

    def lora_pieces(self) -> dict[str, tuple[Piece, ...]]:
        return {entry.name: (Piece(self.lora_name, entry.name, slice(None), None, None),) for entry in self.lora_table}

    def lora_placement(self) -> Placement:
        place = super().lora_placement()
        return Placement(place.shard, place.num_shards, place.replica + self.lora_copy, place.group)

    def lora_full_numel(self) -> int:
        return 0 if self.lora_copy else super().lora_full_numel()

    def lora_bytes(self) -> int:
        return 0 if self.lora_copy else super().lora_bytes()

    def lora_update(self, index: int = 0) -> torch.Tensor:
        """What is added to this rank's shard of the weight: float32 [V/T, H], zero but in the trained rows."""
        delta = self.lora_delta.detach().float()
        return delta.new_zeros(self.lora_base.shape).index_copy_(0, self.lora_columns, delta[self.lora_here])

    def lora_merged(
        self, index: int = 0, stored: torch.Tensor | None = None, rounding: Rounding | None = None
    ) -> torch.Tensor:
        """The weight with the trained rows in it, in new memory and the base's dtype; other rows bit for bit."""
        weight = self.lora_base.dense(index, stored).detach().clone()
        delta = self.lora_delta.detach().to(weight.device)
        weight[self.lora_columns] = merge(weight[self.lora_columns], delta[self.lora_here].float(), rounding)
        return weight

    def _parts(self, delta: torch.Tensor) -> torch.Tensor:
        """``delta``, whose gradient here is this rank's part of a sum that Megatron will average."""
        return _Multiplied.apply(delta, self.lora_group.size())


class _Multiplied(torch.autograd.Function):
    """The identity; its gradient is multiplied."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return dx * ctx.factor, None


class TokenRowsEmbedding(TokenRows, VocabParallelEmbedding):
    """Token ids [B, S] -> [B, S, H], or [S/T, B, H] where the embedding itself scatters to sequence-parallel ranks."""

    def forward(self, input_):
        embedded = super().forward(input_)
        if not self.lora_enabled:
            return embedded
        slots, delta = self.lora_slots[input_], self.lora_delta
        if self.reduce_scatter_embeddings:
            slots = slots.t().chunk(self.lora_group.size())[self.lora_group.rank()]
            delta = self._parts(delta)
        rows = torch.nn.functional.embedding(slots.clamp(min=0), delta.to(embedded.dtype))
        return embedded + torch.where((slots < 0).unsqueeze(-1), torch.zeros_like(rows), rows)


class TokenRowsHead(TokenRows):
    """Hidden states [S, B, H] (S/T under sequence parallelism) -> logits [S, B, V/T], or all columns gathered."""

    def forward(self, input_, weight=None, runtime_gather_output=None, output_cross_entropy_loss=False, **kwargs):
        if output_cross_entropy_loss:
            raise ValueError(
                "trained token rows with --cross-entropy-fusion-impl linear: it multiplies with the frozen weight and "
                "would leave them out; use --cross-entropy-fusion-impl te or native"
            )
        if not self.lora_enabled:
            return super().forward(input_, weight, runtime_gather_output)
        self._check_sums()
        logits, bias = super().forward(input_, weight, False)
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(input_, group=self.lora_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(input_, group=self.lora_group)
        delta = self._parts(self.lora_delta)[self.lora_here].to(logits.dtype)
        # In place: the logits are the largest tensor there is, and nobody else has them yet.
        logits.index_add_(-1, self.lora_columns, hidden.to(logits.dtype) @ delta.t())
        gather = self.gather_output if runtime_gather_output is None else runtime_gather_output
        return (gather_from_tensor_model_parallel_region(logits, group=self.lora_group) if gather else logits), bias

    def _check_sums(self) -> None:
        finalize = getattr(self.config, "finalize_model_grads_func", None)
        if self.lora_copy and self.training and torch.is_grad_enabled() and not hasattr(finalize, SUMS_STAGES):
            raise ValueError(
                "trained token rows are tied over two pipeline stages, and the model's finalize_model_grads_func does "
                "not sum their gradients: set it to slime_plugins.lora.summing_stages(finalize_model_grads)"
            )


class TokenRowsOutputLayer(TokenRowsHead, ColumnParallelLinear):
    """Of Megatron's plain output layer."""


FORMS: dict[type, type[TokenRows]] = {
    VocabParallelEmbedding: TokenRowsEmbedding,
    ColumnParallelLinear: TokenRowsOutputLayer,
}
"""Exact class -> its form with trained rows."""

with contextlib.suppress(ImportError):  # since Megatron-Core 0.16
    from megatron.core.transformer.linear_cross_entropy import LinearCrossEntropyModule

    class TokenRowsFusedOutputLayer(TokenRowsHead, LinearCrossEntropyModule):
        """Of the one that can give the loss in place of logits, which it cannot do with trained rows."""

    FORMS[LinearCrossEntropyModule] = TokenRowsFusedOutputLayer


def adapt_rows(
    module: torch.nn.Module,
    ids: torch.Tensor,
    base: FrozenLinear,
    *,
    name: str,
    first: int,
    vocab_size: int,
    owner: TokenRows | None = None,
    copy: bool = False,
    dtype: torch.dtype | None = None,
) -> TokenRows:
    """Turn an embedding or output layer into its form with trained rows, in place. Outputs do not change.

    Args:
        ids: int64 [N], vocabulary ids, each once.
        first: vocabulary id of row 0 of this rank's weight.
        vocab_size: of the padded vocabulary.
        owner: the carrier of tied rows on this rank.
        copy: tied to an embedding on another stage.
        dtype: of the parameter; None takes the base weight's.
    """
    module.__class__ = FORMS[type(module)]
    assert isinstance(module, TokenRows)  # for type checkers
    rows, hidden = base.shape
    here = ((ids >= first) & (ids < first + rows)).nonzero().flatten()
    slots = torch.full((vocab_size,), -1, dtype=torch.int64)
    slots[ids] = torch.arange(len(ids))
    buffers = {"lora_slots": slots, "lora_here": here, "lora_columns": ids[here] - first}
    for buffer, value in buffers.items():
        module.register_buffer(buffer, value.to(base.device), persistent=False)
    module.lora_name, module.lora_base, module.lora_enabled, module.lora_copy = name, base, True, copy
    module.lora_keep_dtype, module.lora_group = dtype is not None, base.tp_group
    module.lora_experts, module.lora_num_experts = None, 1
    module.__dict__["lora_owner"] = module if owner is None else owner  # past torch: it is not a submodule
    table: tuple[AdapterParameter, ...] = () if owner is not None else token_rows(len(ids), hidden)
    module.lora_table = table
    zeros = {entry.name: torch.zeros(*entry.shape, device=base.device, dtype=dtype or base.dtype) for entry in table}
    install(module, zeros, partial_gradients=False, expert_buffers=False)
    for parameter in module.lora_parameters().values():
        parameter.average_gradients_across_tp_domain = base.tp_group.size() > 1  # type: ignore[attr-defined]
        # Of the two copies of tied rows one counts in the gradient norm; both are reduced in a bucket of their own, so
        # that the parts that a distributed optimizer keeps lie alike on both stages.
        parameter.shared = copy  # type: ignore[attr-defined]
    return module
