"""Routed experts as a config describes them: how many, how they are chosen, and what a layer with them holds. Pure.

Names are canonical (see ``names``), the experts of a layer stacked: ``mlp.experts.gate_proj.weight`` is
[experts, out, in].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from slime_plugins.lora.base.sizes import Sizes

Shapes = dict[str, tuple[int, ...]]
"""Name -> shape."""


@dataclass(frozen=True, kw_only=True)
class RoutedExperts:
    """Those of one base; all of its layers that have any have alike ones."""

    count: int
    top_k: int
    """Experts per token."""
    ffn: int
    """Channels of one."""
    shared_ffn: int
    """Channels of the shared expert, which every token goes to; 0: there is none."""
    renormalised: bool
    """Do the weights of a token's experts add up to 1?"""
    is_sparse: Callable[[int], bool]
    """Has the layer of this number experts?"""
    shapes: Mapping[str, tuple[int, ...]]
    """Name in such a layer -> shape, of router and experts."""

    @classmethod
    def of_qwen(cls, read: Sizes, *, shared: bool, renormalised: bool | None = None) -> RoutedExperts:
        """From the keys of Qwen's configs.

        Args:
            shared: the family has a shared expert, behind a gate.
            renormalised: of families that do not ask their config.
        """
        named = "num_experts" if "num_experts" in read.config else "num_local_experts"  # as transformers 5 writes it
        hidden, count = read.size("hidden_size"), read.size(named)
        dense, step = read.config.get("mlp_only_layers") or [], read.size("decoder_sparse_step", 1)
        if not isinstance(dense, list):
            raise ValueError(f"{read.file}: mlp_only_layers is {dense!r:.80}, expected a list of layer numbers")
        shared_ffn = read.size("shared_expert_intermediate_size") if shared else 0
        gate: Shapes = {"mlp.shared_expert_gate.weight": (1, hidden)} if shared else {}
        return cls(
            count=count,
            top_k=read.size("num_experts_per_tok", most=count),
            ffn=read.size("moe_intermediate_size"),
            shared_ffn=shared_ffn,
            renormalised=read.flag("norm_topk_prob") if renormalised is None else renormalised,
            is_sparse=lambda number: number not in dense and (number + 1) % step == 0,
            shapes=expert_shapes(read, count, shared_ffn) | gate,
        )


def mlp_shapes(name: str, hidden: int, ffn: int, *stack: int) -> Shapes:
    """Of a gated MLP, or of a stack of them."""
    return {
        f"{name}.gate_proj.weight": (*stack, ffn, hidden),
        f"{name}.up_proj.weight": (*stack, ffn, hidden),
        f"{name}.down_proj.weight": (*stack, hidden, ffn),
    }


def expert_shapes(read: Sizes, count: int, shared: int) -> Shapes:
    """Router, routed experts, and shared ones of that width in all (0: none)."""
    hidden = read.size("hidden_size")
    shapes: Shapes = {"mlp.gate.weight": (count, hidden)}
    shapes |= mlp_shapes("mlp.experts", hidden, read.size("moe_intermediate_size"), count)
    return shapes | (mlp_shapes("mlp.shared_experts", hidden, shared) if shared else {})
