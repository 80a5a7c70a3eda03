"""A weight that is stored as codes and is a dense matrix to whoever asks.

``PackedWeight`` has the shape and dtype of the matrix, so names, shape checks, sizes and groupings of parameters are
what they were. ``copy_`` into it quantises; every other operation runs on the dequantised matrix, in new memory;
nothing else may write to it. The codes are quantised where the values arrive; the scales are nested later, by all
tensor-parallel ranks together (``quantize``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from slime_plugins.lora.base.fingerprint import checksum
from slime_plugins.lora.base.quantization import BLOCK
from slime_plugins.lora.quant import nf4


class Packed:
    """The codes of one matrix, shared by every tensor that stands for it.

    Attributes:
        codes: uint8 [O, I/2].
        absmax: float32 [O, I/64], before the scales are nested, or with plain scales; NaN where no value has arrived.
        scales: nested; None before.
        source: int64 [2], ``fingerprint.checksum`` of the values that were quantised: they say which base it is.
        override: a dense matrix that stands in for the codes (``PackedWeight.replaced``).
        rounded: the dtype that dequantised values are rounded to first: of codes out of a checkpoint, the one in which
            they were made; None: the one that is asked for.
    """

    def __init__(self, codes: torch.Tensor, absmax: torch.Tensor | None, source: torch.Tensor) -> None:
        self.codes, self.absmax, self.source = codes, absmax, source
        self.scales: nf4.Scales | None = None
        self.loaded, self.sealed = True, False
        self.override: torch.Tensor | None = None
        self.rounded: torch.dtype | None = None

    @classmethod
    def of(cls, weight: torch.Tensor) -> Packed:
        return cls(*nf4.encode(weight), checksum(weight))

    @classmethod
    def unset(cls, shape: tuple[int, int], device: torch.device) -> Packed:
        """Of a matrix whose values have not arrived: it reads NaN."""
        rows, columns = shape
        codes = torch.zeros(rows, columns // 2, dtype=torch.uint8, device=device)
        absmax = torch.full((rows, columns // BLOCK), float("nan"), device=device)
        unset = cls(codes, absmax, torch.zeros(2, dtype=torch.int64, device=device))
        unset.loaded = False
        return unset

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """[O, I] in new memory; the override itself inside ``replaced``."""
        if self.override is not None:
            return self.override
        absmax = self.absmax if self.scales is None else self.scales.decode()
        assert absmax is not None
        return nf4.decode(self.codes, absmax, self.rounded or dtype).to(dtype)

    def seal(self, scales: nf4.Scales | None) -> None:
        """End of loading: from here on the matrix does not change. ``scales``: nested; None keeps the plain ones."""
        self.sealed = True
        if scales is not None:
            self.scales, self.absmax = scales, None

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> Packed:
        """Another one, of ``fn`` of every tensor."""
        other = Packed(fn(self.codes), None if self.absmax is None else fn(self.absmax), fn(self.source))
        other.scales = None if self.scales is None else nf4.Scales(*map(fn, self.scales))
        other.loaded, other.sealed, other.rounded = self.loaded, self.sealed, self.rounded
        return other

    def become(self, other: Packed) -> None:
        self.__dict__.update(other.__dict__)

    @property
    def nbytes(self) -> int:
        """Of everything that is kept per matrix."""
        tensors = [self.codes, *([] if self.absmax is None else [self.absmax]), *(self.scales or ())]
        return sum(tensor.nbytes for tensor in tensors)


class PackedWeight(torch.Tensor):
    """A frozen [O, I] matrix in the dtype in which it multiplies, stored as ``packed``."""

    packed: Packed
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, packed: Packed, dtype: torch.dtype) -> PackedWeight:
        rows, half = packed.codes.shape
        shape, device = (rows, 2 * half), packed.codes.device
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self.packed = packed
        return self

    def __init__(self, packed: Packed, dtype: torch.dtype) -> None:
        super().__init__()

    def __repr__(self, *, tensor_contents=None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype}, nf4, device={self.device})"

    def __reduce_ex__(self, protocol):
        raise TypeError("a packed weight is not pickled or copied; the base is never saved")

    def __tensor_flatten__(self):
        """There to let ``Module.to`` swap tensors; torch.compile would call it."""
        raise NotImplementedError("a packed weight cannot be compiled or traced")

    __tensor_unflatten__ = __tensor_flatten__

    @contextlib.contextmanager
    def replaced(self, dense: torch.Tensor) -> Iterator[None]:
        """Inside, it is this matrix; on exit its own again."""
        before, self.packed.override = self.packed.override, dense
        try:
            yield
        finally:
            self.packed.override = before

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        kwargs = kwargs or {}
        special = _SPECIAL.get(func)
        if special is not None and isinstance(args[0], PackedWeight):
            result = special(func, args, kwargs)
            if result is not None:
                return result
        for argument, value in zip(func._schema.arguments, args):
            if isinstance(value, PackedWeight) and argument.alias_info is not None and argument.alias_info.is_write:
                if not value.packed.loaded:
                    return value  # an initialiser: what matters is what is loaded, and it stays NaN until then
                raise RuntimeError(f"{func} writes to a 4-bit base weight; only copy_ does, before training")
        args, kwargs = tree_map_only(PackedWeight, dense_of, (args, kwargs))
        return func(*args, **kwargs)


def dense_of(weight: torch.Tensor) -> torch.Tensor:
    """A weight as it multiplies: itself, without gradient, or the dequantised matrix."""
    with torch.no_grad():
        return weight.packed.dense(weight.dtype) if isinstance(weight, PackedWeight) else weight.detach()


def noted(weight: torch.Tensor) -> dict[str, Any]:
    """The attributes that others have put on a parameter: how it is sharded, and the like."""
    return {key: value for key, value in weight.__dict__.items() if key not in ("packed", "_is_param")}


def _like(weight: PackedWeight, packed: Packed) -> PackedWeight:
    """With what Megatron has noted on the parameter: ``Module.to`` makes a new one of every tensor, moved or not."""
    other = PackedWeight(packed, weight.dtype)
    other.__dict__.update(noted(weight))
    return other


def _detach(func, args, kwargs):
    return _like(args[0], args[0].packed)


def _copy(func, args, kwargs):
    weight, values = args[:2]
    if isinstance(values, PackedWeight):
        weight.packed.become(values.packed.map(lambda t: t.to(weight.device, copy=True)))
        return weight
    if weight.packed.sealed:
        raise RuntimeError("copy_ into a 4-bit base weight whose scales are set: 4-bit weights do not change")
    values = values.to(device=weight.device, dtype=weight.dtype).expand(weight.shape)
    weight.packed.become(Packed.of(values))
    return weight


def _clone(func, args, kwargs):
    return _like(args[0], args[0].packed.map(torch.clone))


def _moved(func, args, kwargs):
    """To another device as codes; in another dtype it is the matrix's values that are wanted (None)."""
    weight, device = args[0], kwargs.get("device")
    if kwargs.get("dtype") not in (None, weight.dtype):
        return None
    return _like(weight, weight.packed.map(lambda t: t.to(device or t.device, copy=True)))


_aten = torch.ops.aten
_SPECIAL: dict[Any, Callable] = {
    _aten.detach.default: _detach,
    _aten.alias.default: _detach,
    _aten.copy_.default: _copy,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _moved,
}
