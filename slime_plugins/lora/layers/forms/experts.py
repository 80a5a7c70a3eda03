"""Adapters of routed experts: one per expert, stacked, and run by grouped products.

A linear of experts is called with the rows of all its experts, sorted, and the number of rows of each:
``linear(x [N, I], m_splits)``. TransformerEngine has such a linear (see ``te``); for Megatron's SequentialMLP, a list
of small MLPs, ``ExpertLinears`` makes one of the MLPs' linears. Both carry their adapter under the same parameter
names, ``mlp.experts.linear_fc1.lora_A``, and the base keeps its own.

Tokens are dispatched to experts and combined again outside of these linears, over expert-parallel and expert-tensor-
parallel ranks: with the latter, inputs are whole, and outputs and input gradients partial ("outside" in ``lowrank``).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name
from megatron.core.transformer.moe.experts import SequentialMLP

from slime_plugins.lora.layers.adapter import LoRALinear
from slime_plugins.lora.layers.grouped import segments
from slime_plugins.lora.layers.pieces import adapter_sharded_tensors


class LoRAExperts(LoRALinear):
    """Mixin in front of a linear of experts. lora_A [E, P*R, I], lora_B [E, rows, R]; an expert may have no token."""

    def forward(self, x: torch.Tensor, m_splits):
        """x [N, I], sorted by expert; m_splits: rows of each expert (a list, or a tensor as newer TE has it)."""
        if not self.lora_enabled:
            return super(LoRALinear, self).forward(x, m_splits)
        splits = m_splits.tolist() if isinstance(m_splits, torch.Tensor) else m_splits
        product = segments(splits, x.device)
        x, h, exchanges = self._lora_down(x, product=product)
        output, bias = super(LoRALinear, self).forward(x, m_splits)
        return self._lora_up(output, h, exchanges, product), bias

    def _lora_dropout(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank has tokens or features of its own (``spec_for`` refuses dropout where some have the same)."""
        with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
            return torch.nn.functional.dropout(x, self.lora.config.dropout)


class ExpertLinears(torch.nn.Module):
    """The same linear (fc1 or fc2) of every expert of a SequentialMLP, as one linear. Owns no base weight."""

    def __init__(self, experts: SequentialMLP, leaf: str) -> None:
        super().__init__()
        # In a tuple and a plain attribute: registered, the base weights would have two names.
        self.linears = tuple(getattr(expert, leaf) for expert in experts.local_experts)
        self.config, self.ep_group = experts.config, experts.ep_group
        self.__dict__["sequential"], self.leaf = experts, leaf

    sequential: SequentialMLP
    leaf: str

    def forward(self, x: torch.Tensor, m_splits):
        """x [N, I], sorted by expert -> [N, O], None."""
        rows = x.split(m_splits.tolist() if isinstance(m_splits, torch.Tensor) else list(m_splits))
        return torch.cat([linear(row)[0] for linear, row in zip(self.linears, rows)]), None


class ExpertColumnLinears(ExpertLinears):
    """fc1."""


class ExpertRowLinears(ExpertLinears):
    """fc2."""


class LoRAExpertLinears(LoRAExperts):
    """Mixin of the two below: where their adapter goes when it is there."""

    sequential: Any
    leaf: str

    def lora_installed(self) -> None:
        self.sequential.add_module(self.leaf, self)
        self.sequential.__class__ = LoRASequentialMLP


class LoRAExpertColumnLinears(LoRAExpertLinears, ExpertColumnLinears):
    """Rows of W and B sharded over expert-tensor-parallel ranks, A replicated."""


class LoRAExpertRowLinears(LoRAExpertLinears, ExpertRowLinears):
    """Columns of W and A sharded over expert-tensor-parallel ranks, B replicated."""


class LoRASequentialMLP(SequentialMLP):
    """A SequentialMLP that runs fc1 of all its experts, then the activation once, then fc2 of all."""

    def forward(self, permuted_local_hidden_states, tokens_per_expert, permuted_probs):
        linears = {leaf: self._modules.get(leaf) for leaf in ("linear_fc1", "linear_fc2")}
        if not any(linear is not None and linear.lora_enabled for linear in linears.values()):
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
        splits = tokens_per_expert.tolist()
        # One of the MLPs with grouped linears in place of its own: what else an MLP does is Megatron's code.
        mlp = copy.copy(self.local_experts[0])
        mlp._modules = dict(mlp._modules)
        for leaf, linear in linears.items():
            mlp._modules[leaf] = _WithSplits(linear or ExpertLinears(self, leaf), splits)
        return mlp(permuted_local_hidden_states, permuted_probs)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """The base's entries, which come from the MLPs, and the adapters'."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for leaf in ("linear_fc1", "linear_fc2"):
            if isinstance(self._modules.get(leaf), LoRAExpertLinears):
                state.update(adapter_sharded_tensors(self._modules[leaf], f"{prefix}{leaf}.", sharded_offsets))
        return state


class _WithSplits(torch.nn.Module):
    """A linear of experts that knows the rows of each, to be called as any other linear."""

    def __init__(self, linear: ExpertLinears, splits: list[int]) -> None:
        super().__init__()
        self.linear, self.splits = linear, splits

    def forward(self, x: torch.Tensor):
        return self.linear(x, self.splits)


def linears_of_experts(module: Any) -> dict[str, ExpertLinears]:
    """``linear_fc1`` and ``linear_fc2`` of a SequentialMLP, not part of it yet; {} for any other module, and for one
    whose experts do more than a grouped linear can stand for."""
    if type(module) is not SequentialMLP or module.config.add_bias_linear:
        return {}
    if module.config.moe_apply_probs_on_input or module.config.fp8:
        return {}
    return {
        "linear_fc1": ExpertColumnLinears(module, "linear_fc1"),
        "linear_fc2": ExpertRowLinears(module, "linear_fc2"),
    }
