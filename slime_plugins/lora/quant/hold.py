"""Dense for the time of one product: what surrounds the forward of a linear with packed weights.

Before the forward the weights are dequantised and put in the packed ones' places, so the linear's own code multiplies
with them. What autograd would keep of them becomes a ticket, and backward dequantises anew. When the forward is over
their memory is given back at once, whoever still refers to it: TransformerEngine's fused norm and linear keep the
weight in their context, for its attributes alone (versions 2.6 to 2.20).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from slime_plugins.lora.quant.packed import PackedWeight, dense_of, noted


def hold(module: torch.nn.Module, names: Sequence[str]) -> None:
    """Let a linear multiply with its packed weights, the parameters of these names. Once per linear."""
    hooks = _Hold(tuple(names))
    module.register_forward_pre_hook(hooks.before)
    module.register_forward_hook(hooks.after, always_call=True)


class _Hold:
    """The hooks of one linear."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._open: contextlib.ExitStack | None = None
        self._again = {name: _Again() for name in names}

    def before(self, module: torch.nn.Module, args: tuple) -> None:
        with contextlib.ExitStack() as stack:
            kept: dict[int, tuple[_Again, PackedWeight]] = {}
            empty = _is_empty(args)
            for name in self._names:
                packed: Any = _packed(module, name)
                dense = _nothing_of(packed) if empty else dense_of(packed)
                stand_in = torch.nn.Parameter(dense, requires_grad=False)
                stand_in.__dict__.update(noted(packed))
                module._parameters[name] = stand_in
                stack.callback(module._parameters.__setitem__, name, packed)
                if packed.packed.override is None and not empty:
                    stack.callback(_free, dense)
                    kept[dense.untyped_storage().data_ptr()] = self._again[name], packed
            if torch.is_grad_enabled():
                stack.enter_context(_tickets(kept))
            self._open = stack.pop_all()

    def after(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        stack, self._open = self._open, None
        if stack is not None:  # None: ``before`` itself has failed
            stack.close()


def _is_empty(args: tuple) -> bool:
    """Has the linear no rows to multiply: an expert of a SequentialMLP without tokens?"""
    return bool(args) and isinstance(args[0], torch.Tensor) and args[0].numel() == 0


def _nothing_of(packed: PackedWeight) -> torch.Tensor:
    """Of the shape of a matrix that multiplies nothing: one element of memory."""
    return torch.zeros((), dtype=packed.dtype, device=packed.device).expand(packed.shape)


def _packed(module: torch.nn.Module, name: str) -> PackedWeight:
    weight: Any = module._parameters[name]
    # Assignment to ``.data``, which is how a module is cast, leaves the class and gives it memory.
    if not isinstance(weight, PackedWeight) or weight.data_ptr():
        raise RuntimeError(
            f"a 4-bit base weight ({name} of {type(module).__name__}) has become dense {weight.dtype}; "
            "build the model in the dtype that it trains in, and quantise it after that"
        )
    return weight


def _free(dense: torch.Tensor) -> None:
    """Give the memory back, whoever refers to the tensor."""
    dense.untyped_storage().resize_(0)


class _Again:
    """A weight in backward: dequantised once while anyone has it (TransformerEngine saves it twice)."""

    _dense: weakref.ref[torch.Tensor] | None = None

    def get(self, packed: PackedWeight) -> torch.Tensor:
        dense = None if self._dense is None else self._dense()
        if dense is None:
            dense = dense_of(packed)
            self._dense = weakref.ref(dense)
        return dense


class _Ticket(NamedTuple):
    """What autograd keeps in place of a dense weight, or of a view of it."""

    again: _Again
    packed: PackedWeight
    size: torch.Size
    stride: tuple[int, ...]
    offset: Any

    def redeem(self) -> torch.Tensor:
        dense = self.again.get(self.packed)
        if (self.size, self.stride, self.offset) == (dense.shape, dense.stride(), dense.storage_offset()):
            return dense
        return dense.as_strided(self.size, self.stride, self.offset)


def _tickets(kept: dict[int, tuple[_Again, PackedWeight]]):
    """Inside, tensors in these memories (address -> weight) are saved as tickets, all others as they would be."""
    # Of hooks that are nested torch runs the innermost alone: non-reentrant checkpoints have some around this.
    outer = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def pack(tensor: torch.Tensor) -> Any:
        found = kept.get(tensor.untyped_storage().data_ptr()) if type(tensor) is not PackedWeight else None
        if found is not None:
            return _Ticket(*found, tensor.shape, tensor.stride(), tensor.storage_offset())
        return tensor if outer is None else outer[0](tensor)

    def unpack(saved: Any) -> torch.Tensor:
        if isinstance(saved, _Ticket):
            return saved.redeem()
        return saved if outer is None else outer[1](saved)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
