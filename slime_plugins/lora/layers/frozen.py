"""What a frozen linear is, to everything that adapts, merges, counts or compares it.

One object per linear, one class per kind; ``kinds.KINDS`` says which class of module is which kind. What is asked of a
base weight is asked here, so a base that is stored otherwise (packed, quantised) is another kind and nothing else.

Shapes: O/I rows and columns of this rank's shard of one matrix, E matrices on this rank (experts), 1 for most.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from megatron.core import parallel_state

from slime_plugins.lora.quant.packed import PackedWeight, dense_of


class FrozenLinear:
    """A Megatron linear (``ColumnParallelLinear``, ``RowParallelLinear``) and the base of the other kinds.

    Args:
        module: the linear itself.
        parallel: ``column``, ``row``, or ``duplicated``: whole on every tensor-parallel rank.
        frozen_of: what makes such objects, for a linear that is made of others.
    """

    returns_bias = True
    """``forward`` returns (output, bias), as Megatron's linears do; else the output alone."""
    owns_weights = True
    """False for a linear that is made of others, which the model has too: what is counted must be counted once."""
    can_be_packed = True
    """May its weight be held in codes?"""

    def __init__(
        self, module: torch.nn.Module, parallel: str, frozen_of: Callable[[torch.nn.Module], FrozenLinear]
    ) -> None:
        self.module: Any = module
        self.parallel = parallel
        self._frozen_of = frozen_of

    # The weights ---------------------------------------------------------------------------------------------------

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The tensors that hold the weights, as the model has them: loaders and weight syncs know them by identity."""
        weight = self.module.weight
        return [] if weight is None else [weight]  # None: an output layer tied to the embedding

    def dense(self, index: int, stored: torch.Tensor | None = None) -> torch.Tensor:
        """The weights that ``parameters[index]`` holds, as they multiply: [O, I], or [E, O, I] of several experts.

        Args:
            stored: a copy of that parameter to read instead of the live one (slime's, while it is offloaded).
        """
        return dense_of(self.parameters[index] if stored is None else stored)

    def experts_in(self, index: int) -> Any:
        """Which experts ``parameters[index]`` holds, as an index into the rank's [E, ...]; ``...`` without experts."""
        return ...

    def matrices(self) -> list[torch.Tensor]:
        """Every matrix of this rank, dense, [O, I]: one, or one per expert."""
        return [self.dense(i) for i in range(len(self.parameters))]

    @property
    def count(self) -> int:
        """Number of ``matrices``, without making them."""
        return len(self.parameters)

    def stored(self) -> list[torch.Tensor]:
        """The same matrices, those in codes as they are: ``PackedWeight``, not dequantised."""
        return [p if isinstance(p, PackedWeight) else self.dense(i) for i, p in enumerate(self.parameters)]

    @contextlib.contextmanager
    def replaced(self, dense: list[torch.Tensor]) -> Iterator[None]:
        """Inside, the linear multiplies with these instead, one per parameter as ``dense`` gives them; on exit its old
        bits are back. Costs a copy of the weights while it lasts: W + BA - BA is not W in bf16 (design hazard 12)."""
        with contextlib.ExitStack() as stack:
            for parameter, value in zip(self.parameters, dense):
                stack.enter_context(
                    parameter.replaced(value) if isinstance(parameter, PackedWeight) else _written(parameter, value)
                )
            yield

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        rows, columns = self.parameters[0].shape[-2:]
        return rows, columns

    @property
    def dtype(self) -> torch.dtype:
        """Of the dense weights."""
        return self.parameters[0].dtype

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    # Where it is ---------------------------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        """Megatron's TransformerConfig."""
        return self.module.config

    @property
    def tp_group(self) -> Any:
        """The (expert-)tensor-parallel group over which it is cut, or would be."""
        return self.module.tp_group

    @property
    def shards(self) -> int:
        """Number of shards of the weight."""
        return 1 if self.parallel == "duplicated" else self.tp_group.size()

    @property
    def ep_group(self) -> Any:
        """The expert-parallel group of a linear of experts; None for others."""
        return None

    @property
    def experts(self) -> range | None:
        """The experts of this rank, as numbers in the whole layer; None for a linear that is not of experts."""
        if self.ep_group is None:
            return None
        first = self.ep_group.rank() * self.count
        return range(first, first + self.count)

    @property
    def num_experts(self) -> int:
        """Of the whole layer; 1 for a linear that is not of experts."""
        return 1 if self.experts is None else len(self.experts) * self.ep_group.size()

    # What it does ----------------------------------------------------------------------------------------------------

    @property
    def leaves_exchange_to_caller(self) -> bool:
        """Are partial sums the caller's business? Of experts, and of shared experts that overlap with them."""
        return self.module.explicit_expert_comm

    @property
    def tokens(self) -> str:
        """Which tokens the linear takes and gives, and who exchanges them.

        whole: all of the tensor-parallel group's, the linear sums. sequence: this rank's, the linear gathers and
        scatters. outside: all of them, and partial sums are the caller's business.
        """
        if self.parallel != "duplicated" and self.leaves_exchange_to_caller:
            return "outside"
        return "sequence" if self.config.sequence_parallel and self.tp_group.size() > 1 else "whole"


@contextlib.contextmanager
def _written(parameter: torch.Tensor, value: torch.Tensor) -> Iterator[None]:
    saved = parameter.detach().clone()
    try:
        with torch.no_grad():
            parameter.copy_(value)
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(saved)


class FrozenTELinear(FrozenLinear):
    """A dense linear of TransformerEngine in Megatron's wrapper."""

    @property
    def tp_group(self) -> Any:
        """The wrapper's: TE's own is None where TE does not communicate."""
        return self.module._tp_group

    @property
    def leaves_exchange_to_caller(self) -> bool:
        return self.module.parallel_mode is None


class FrozenTEGroupedLinear(FrozenTELinear):
    """All experts of a rank in one linear of TransformerEngine: a weight each or, in its newer form, one [E, O, I]."""

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        if self._is_single:
            return super().parameters
        return [getattr(self.module, f"weight{i}") for i in range(self.module.num_gemms)]

    @property
    def _is_single(self) -> bool:
        return getattr(self.module, "weight0", None) is None

    def dense(self, index: int, stored: torch.Tensor | None = None) -> torch.Tensor:
        dense = super().dense(index, stored)
        return dense.view(self.module.num_gemms, *self.shape) if self._is_single else dense

    def experts_in(self, index: int) -> Any:
        return slice(None) if self._is_single else index

    def matrices(self) -> list[torch.Tensor]:
        return self.stored() if self._is_single else super().matrices()

    def stored(self) -> list[torch.Tensor]:
        return list(self.module._get_weight_tensors()) if self._is_single else super().stored()

    @property
    def count(self) -> int:
        return self.module.num_gemms

    @property
    def shape(self) -> tuple[int, int]:
        if not self._is_single:
            return super().shape
        rows, columns = self.module._get_weight_tensors()[0].shape
        return rows, columns

    @property
    def ep_group(self) -> Any:
        return self.module._pg_collection.ep

    @property
    def leaves_exchange_to_caller(self) -> bool:
        return self.module.explicit_expert_comm


class FrozenExperts(FrozenLinear):
    """The same linear of every expert of a SequentialMLP: ``module.linears``, Megatron's or TransformerEngine's."""

    owns_weights = False

    @cached_property
    def _ones(self) -> list[FrozenLinear]:
        return [self._frozen_of(linear) for linear in self.module.linears]

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for one in self._ones for parameter in one.parameters]

    def dense(self, index: int, stored: torch.Tensor | None = None) -> torch.Tensor:
        return self._ones[index].dense(0, stored)

    def experts_in(self, index: int) -> Any:
        return index

    @property
    def tp_group(self) -> Any:
        return self._ones[0].tp_group

    @property
    def ep_group(self) -> Any:
        return self.module.ep_group

    @property
    def leaves_exchange_to_caller(self) -> bool:
        return self._ones[0].leaves_exchange_to_caller


class FrozenRouter(FrozenLinear):
    """Megatron's router: logits from ``gating``, the weight whole on every rank."""

    returns_bias = False
    can_be_packed = False

    @property
    def leaves_exchange_to_caller(self) -> bool:
        return False


class FrozenPlainLinear(FrozenLinear):
    """torch's own linear in a module of Hugging Face's (slime's linear attention): whole on every rank.

    Around it slime gathers the tokens of sequence parallelism, and gives each rank its part of the input's gradient
    without a sum: all ranks compute the same, the gradients of A and B too.
    """

    returns_bias = False
    can_be_packed = False

    @property
    def config(self) -> Any:
        """None: it knows of no model around it."""
        return None

    @property
    def tp_group(self) -> Any:
        return parallel_state.get_tensor_model_parallel_group()

    @property
    def tokens(self) -> str:
        return "whole"
