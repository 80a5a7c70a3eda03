"""The adapter that lives on a linear: how it starts, and the mixin that runs it.

An adapted linear keeps its class's code, its parameters and their names; it gains the parameters of ``parameters``'s
table, and its class becomes a subclass with ``LoRALinear`` in front. A linear of experts has them with the rank's
experts in front, [E, ...], sharded over expert-parallel ranks; the tensor-parallel group is then the experts'.

Rows of lora_B are those of the adapted projections. They lie in the base's own order: over the whole linear if one
block covers it, else projection after projection. ``AdapterSpec.rows_of`` has them in Hugging Face order.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from slime_plugins.lora.layers.carrier import Carrier, install
from slime_plugins.lora.layers.frozen import FrozenLinear
from slime_plugins.lora.layers.fused import Fused
from slime_plugins.lora.layers.lowrank import Collective, Dense, down, up
from slime_plugins.lora.layers.pieces import Piece, pieces_of
from slime_plugins.lora.layers.spec import AdapterSpec
from slime_plugins.lora.parameters import AdapterParameter, lora_parameters
from slime_plugins.lora.projections import Rounding, low_rank_update, merge

# parallel mode, where the tokens are -> collective on h forward, on dh backward. See the table in ``lowrank``.
COLLECTIVES = {
    ("column", "whole"): ("none", "sum"),
    ("column", "sequence"): ("gather", "scatter"),
    ("column", "outside"): ("none", "sum_apart"),
    ("row", "whole"): ("sum", "none"),
    ("row", "sequence"): ("scatter", "gather"),
    ("row", "outside"): ("sum_apart", "none"),
}


class LoRALinear(Carrier):
    """Mixin in front of a Megatron linear class: y = base(x) + scaling * drop(x) A^T B^T.

    A variant of LoRA overrides ``lora_describe`` (its parameters), ``lora_initial``, the forward, and ``lora_update``
    or ``lora_merged``; everything else reads the table.

    Attributes:
        lora: the AdapterSpec.
        lora_base: the FrozenLinear.
        lora_fused: how it runs as one autograd function; None: by taps around the base.
        lora_why_taps: what forbids the former; "" if nothing does.
        lora_A, lora_B: the parameters, shapes as in ``parameters``.
    """

    lora: AdapterSpec
    lora_base: FrozenLinear
    lora_fused: Fused | None
    lora_why_taps: str
    lora_A: torch.nn.Parameter
    lora_B: torch.nn.Parameter

    # What it is ----------------------------------------------------------------------------------------------------

    def lora_describe(self) -> tuple[AdapterParameter, ...]:
        """The table of its parameters."""
        spec = self.lora
        return lora_parameters(
            spec.parallel, rows=spec.rows, columns=self.lora_base.shape[1], rank=spec.rank, stacked=spec.num_A
        )

    def lora_initial(self, entry: AdapterParameter) -> torch.Tensor:
        """How a parameter starts: float32, this rank's part, experts in front. B is zero: no output changes.

        The full A depends on seed and name alone: every expert, at every parallelism, starts from its own.
        """
        spec = self.lora
        stack = () if spec.experts is None else (len(spec.experts),)
        if entry.name != "lora_A":
            return torch.zeros(*stack, *entry.shape)
        full = entry.shape[1] * (self.lora_base.shards if entry.sharded_dim is not None else 1)
        first = self.lora_group.rank() * entry.shape[1] if entry.sharded_dim is not None else 0
        columns = slice(first, first + entry.shape[1])
        if spec.experts is None:
            return _full_A(spec, full)[:, columns]
        return torch.stack([_full_A(one, full)[:, columns] for one in spec.one_by_one()])

    def lora_pieces(self) -> dict[str, tuple[Piece, ...]]:
        return pieces_of(self.lora_table, self.lora)

    def lora_installed(self) -> None:
        """Called once, when the adapter is there."""

    # What it computes ------------------------------------------------------------------------------------------------

    def lora_why_not_fused(self) -> str:
        """What forbids it to run as one autograd function; "" for a form that can (``choice``, ``fused``)."""
        return "no fused form of its class"

    def forward(self, input_, *args, **kwargs):
        """Shapes and return form of the base's forward."""
        if not self.lora_enabled or self.lora_fused is not None:
            return super().forward(input_, *args, **kwargs)
        input_, h, exchanges = self._lora_down(input_)
        result = super().forward(input_, *args, **kwargs)
        if not self.lora_base.returns_bias:
            return self._lora_up(result, h, exchanges)
        output, bias = result
        return self._lora_up(output, h, exchanges), bias

    def _lora_down(self, x: torch.Tensor, seen_by_A: torch.Tensor | None = None, product: Any = Dense):
        """First tap. ``seen_by_A``: what A multiplies where that is not the base's input."""
        kinds = ("none", "none")
        if self.lora_base.shards > 1:
            kinds = COLLECTIVES[self.lora.parallel, self.lora_base.tokens]
            if not torch.is_grad_enabled():  # then there is no weight gradient to sum for
                kinds = (kinds[0].replace("sum_apart", "none"), kinds[1].replace("sum_apart", "none"))
        exchanges = tuple(Collective(kind, self.lora_group) for kind in kinds)
        if self.training and self.lora.config.dropout:
            seen_by_A = self._lora_dropout(x if seen_by_A is None else seen_by_A)
        x, h = down(x, seen_by_A, self.lora_A.to(x.dtype), exchanges, product)
        return x, h, exchanges

    def _lora_up(self, y: torch.Tensor, h: torch.Tensor, exchanges, product: Any = Dense) -> torch.Tensor:
        return up(y, h, self.lora_B.to(y.dtype), self.lora.blocks, exchanges, product)

    def _lora_dropout(self, x: torch.Tensor) -> torch.Tensor:
        """Mask a sharded input from the model-parallel RNG and a replicated one from the common RNG.

        So shards get different masks, replicas the same one, and Megatron's recompute, which restores both, replays
        them (as Megatron does for its own dropouts).
        """
        sharded = self.lora.parallel == "row" or self.lora_base.tokens == "sequence"
        if sharded and self.lora_group.size() > 1:
            with get_cuda_rng_tracker().fork():
                return torch.nn.functional.dropout(x, self.lora.config.dropout)
        return torch.nn.functional.dropout(x, self.lora.config.dropout)

    # What it comes to ------------------------------------------------------------------------------------------------

    def lora_update(self, index: int = 0) -> torch.Tensor:
        """scaling * B A of this rank's shard of base parameter ``index``: float32 [O, I], or [E, O, I] of its experts.

        No communication.
        """
        where = self.lora_base.experts_in(index)
        A, B = self.lora_A.detach()[where], self.lora_B.detach()[where]
        update = torch.zeros(*A.shape[:-2], *self.lora_base.shape, device=A.device)
        for block in self.lora.blocks:
            rows = block.out.run_index().to(A.device)
            update[..., rows, :] = low_rank_update(A[..., block.cols, :], B[..., block.rows, :], block.scaling)
        return update

    def lora_merged(
        self, index: int = 0, stored: torch.Tensor | None = None, rounding: Rounding | None = None
    ) -> torch.Tensor:
        """W' of base parameter ``index``, in new memory and the base's dtype. No communication.

        Args:
            stored: as in ``FrozenLinear.dense``.
        """
        return merge(self.lora_base.dense(index, stored), self.lora_update(index), rounding)

    def lora_update_squares(self) -> torch.Tensor:
        """Sum of squares of scaling * B A on this rank, [1] or [E], from products of the rank's size.

        |BA|^2 = sum((B^T B) * (A A^T)). One of A and B is sharded over tensor-parallel ranks, the other whole (or both
        are): the ranks' values add up.
        """
        A, B = (p if p.ndim == 3 else p[None] for p in (self.lora_A.detach().float(), self.lora_B.detach().float()))
        total = torch.zeros(A.shape[0], device=A.device)
        for block in self.lora.blocks:
            A_ERI, B_EOR = A[:, block.cols], B[:, block.rows]
            total += block.scaling**2 * ((B_EOR.mT @ B_EOR) * (A_ERI @ A_ERI.mT)).sum((1, 2))
        return total.clamp_(min=0)


def adapt(
    linear: torch.nn.Module,
    form: type[LoRALinear],
    base: FrozenLinear,
    spec: AdapterSpec,
    dtype: torch.dtype | None,
    linears: str = "auto",
) -> LoRALinear:
    """Turn a linear into its LoRA form in place. B starts at zero: the output does not change. Returns the linear.

    Args:
        form: subclass of ``type(linear)`` with ``LoRALinear`` in front.
        dtype: of the parameters; None takes the base weight's.
        linears: ``taps`` forbids that it runs fused.
    """
    linear.__class__ = form
    assert isinstance(linear, form)  # for type checkers
    linear.lora, linear.lora_base, linear.lora_enabled = spec, base, True
    linear.lora_keep_dtype, linear.lora_group = dtype is not None, base.tp_group
    linear.lora_experts, linear.lora_num_experts = spec.experts, spec.num_experts
    linear.lora_table = linear.lora_describe()
    install(
        linear,
        {
            entry.name: linear.lora_initial(entry).to(device=base.device, dtype=dtype or base.dtype)
            for entry in linear.lora_table
        },
        partial_gradients=base.tokens == "sequence",
        expert_buffers=spec.experts is not None and not _expert_groups_are_dense(linear),
    )
    linear.lora_installed()
    linear.lora_why_taps = "asked for" if linears == "taps" else _why_taps(linear)
    linear.lora_fused = None if linear.lora_why_taps else Fused(linear)
    return linear


def _why_taps(linear: LoRALinear) -> str:
    plain = all(getattr(type(linear), name) is getattr(LoRALinear, name) for name in ("_lora_down", "_lora_up"))
    return linear.lora_why_not_fused() if plain else "a variant with products of its own"


def _expert_groups_are_dense(linear: LoRALinear) -> bool:
    """Are the ranks that hold equal experts those that hold equal dense weights?"""
    dense_tp_size = parallel_state.get_tensor_model_parallel_world_size()
    assert linear.lora.experts is not None
    return linear.lora.num_experts == len(linear.lora.experts) and linear.lora_group.size() == dense_tp_size


def _full_A(spec: AdapterSpec, fan_in: int) -> torch.Tensor:
    """The whole A, float32 [P*R, I]."""
    stacked = []
    for i in range(spec.num_A):
        rank = spec.ranks[i] if spec.split else spec.rank
        key = f"{spec.config.seed}:{spec.name}:{spec.parts[i].name if spec.split else 'fused'}"
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little", signed=True)
        generator = torch.Generator().manual_seed(seed)
        A = torch.zeros(spec.rank, fan_in)
        if spec.config.init == "kaiming":  # kaiming_uniform_(a=sqrt(5)) of a [rank, in] matrix, as PEFT has it
            A[:rank].uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=generator)
        else:
            A[:rank].normal_(0.0, 1 / spec.rank, generator=generator)
        stacked.append(A)
    return torch.cat(stacked)
