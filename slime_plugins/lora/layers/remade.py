"""An input that the backward makes again, from what the graph keeps of the operation that made it.

The gradient of A needs the input of its linear. Where that is a product of two tensors, as in front of an MLP's second
linear (SiLU(gate) * up), it need not be kept: the product's own backward keeps both factors, or Megatron's fused
SwiGLU what both are made from. Made again by the same operation it has the same bits. It costs three passes over it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.fusions import fused_bias_swiglu


@dataclass(frozen=True)
class Remade:
    """A tensor, as the operation that makes it."""

    sources: tuple[torch.Tensor, ...]
    """What the graph keeps for that operation's own backward."""
    make: Callable[..., torch.Tensor]
    """Sources -> the tensor, in some shape."""


def remade(x: torch.Tensor) -> Remade | None:
    """How to make x again without keeping more than the graph does; None if its maker is not one of ``_MAKERS``.

    Ask while the graph is being built: a graph that has run backward has let go of what it kept.
    """
    node = x.grad_fn
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    maker = None if node is None else _MAKERS.get(node.name())
    found = None if maker is None else maker(node)
    if found is None or sum(source.numel() for source in found.sources) != 2 * x.numel():
        return None
    return found


def _of_product(node: Any) -> Remade | None:
    # Only what the gradient of the other needs is kept; a factor that is not is None.
    factors = (node._saved_self, node._saved_other)
    return None if None in factors else Remade(factors, torch.mul)


def _of_swiglu(node: Any) -> Remade | None:
    if node._forward_cls is not fused_bias_swiglu.SwiGLUFunction or node.fp8_input_store:
        return None
    # Looked up when it runs, as Megatron's own forward and backward do: bench/traffic.py puts a counted one there.
    return Remade(node.saved_tensors, lambda both: fused_bias_swiglu.swiglu(both))


_VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")
_MAKERS: dict[str, Callable[[Any], Remade | None]] = {
    "MulBackward0": _of_product,
    "SwiGLUFunctionBackward": _of_swiglu,
}
"""Name of an operation's node in the graph -> how it is done again."""
