"""Matrices that a checkpoint holds as codes with scales beside them, read as the dense ones that they stand for.

bitsandbytes' NF4 is known. Its serialised form of a weight W (``QuantState.as_dict(packed=True)``) is tensors whose
names begin with W:

    W                                      codes, two in a byte, high half first, row after row
    W.absmax                               a scale per block: float32, or 8 bits of nested scales
    W.quant_map                            float32 [16], what each code stands for
    W.nested_absmax, W.nested_quant_map    of nested scales: float32 per group of 8-bit scales, float32 [256]
    W.quant_state.bitsandbytes__nf4        JSON in bytes: shape, dtype, sizes of blocks and groups, mean of the scales

The arithmetic is a look-up and two products in float32, rounded once: bitsandbytes' own, bit for bit. It is done here,
so that names, checks and exports need no bitsandbytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slime_plugins.lora.files.json_text import parse_json
from slime_plugins.lora.files.safetensors import Stored, torch_dtype

if TYPE_CHECKING:
    import torch

_STATE = ".quant_state.bitsandbytes__"
_LARGEST_STATE = 4096
"""Bytes of JSON; bitsandbytes writes some 170."""
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Scales:
    """Of one matrix, whole, in the order of its blocks; one dimension each."""

    absmax: torch.Tensor
    """float32, or uint8 where they are nested."""
    groups: torch.Tensor | None = None
    """float32: the scale of every group of nested ones."""
    mean: float = 0.0


@dataclass(frozen=True)
class Coded(Stored):
    """A matrix in NF4 codes. ``dtype`` and ``shape`` are the dense one's; its bytes are all that is stored of it."""

    parts: tuple[Stored, ...]
    """Codes, scales, what codes stand for; of nested scales their own two; the state."""
    block: int
    """Weights, row after row, that share a scale."""
    group: int | None
    """Scales that share a scale; None where they are not nested."""
    mean: float

    @property
    def files(self) -> set[Path]:
        """More than one where an index has torn a matrix apart."""
        return {part.file for part in self.parts}

    def bytes(self, start: int = 0, stop: int | None = None) -> bytearray:
        data = bytearray()
        for part in self.parts:
            size = part.end - part.start
            if start < size and (stop is None or stop > 0):
                data += part.bytes(max(start, 0), stop)
            start, stop = start - size, None if stop is None else stop - size
        return data

    def read(self, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        """As of a dense one. The whole matrix is made first: a shard of codes may begin within a block."""
        dense = self.decode(self.bytes())
        if rows == columns == slice(None):
            return dense
        return dense[rows, columns].clone()

    def decode(self, data: bytearray, *, rows: int | None = None) -> torch.Tensor:
        import torch

        codes, absmax, values, *nested = self._tensors(data)
        if self.group is not None:
            groups, steps = nested
            absmax = steps[absmax.int()] * groups.repeat_interleave(self.group)[: absmax.numel()] + self.mean
        looked_up = values[torch.stack([codes >> 4, codes & 15], dim=1).view(-1).int()]
        numel = math.prod(self.shape)
        padded = torch.nn.functional.pad(looked_up[:numel], (0, -numel % self.block))
        dense = (padded.view(-1, self.block) * absmax[:, None]).view(-1)[:numel]
        return dense.to(torch_dtype(self.dtype)).view(self.shape)

    def stored(self) -> tuple[torch.Tensor, Scales]:
        """Codes uint8 [O, I/2] (I is even) and scales as they are."""
        codes, absmax, _, *nested = self._tensors(self.bytes())
        scales = Scales(absmax, nested[0], self.mean) if nested else Scales(absmax)
        return codes.view(self.shape[0], self.shape[1] // 2), scales

    def _tensors(self, data: bytearray) -> list[torch.Tensor]:
        """All parts but the state."""
        import torch

        found, at = [], 0
        for part in self.parts[:-1]:
            size = part.end - part.start
            found.append(part.decode(data[at : at + size]).reshape(-1))
            at += size
        return [found[0].view(torch.uint8), *found[1:]]  # codes may be stored in any dtype


def in_matrices(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Of all tensors of a checkpoint: those in codes as the matrices that they stand for, the others as they are.

    Raises:
        ValueError: codes of a form that is not known, or whose tensors do not fit each other.
    """
    states = {name.partition(_STATE)[0]: name for name in tensors if _STATE in name}
    if not states:
        return dict(tensors)
    found: dict[str, Stored] = {}
    beside = set(states.values())
    for weight, state in states.items():
        form = state.partition(_STATE)[2]
        if form != "nf4":
            raise ValueError(
                f"{weight} is in bitsandbytes' {form[:40]!r} codes, and nf4 alone is read (QLoRA's form, more exact "
                "at the same size): quantise the dense checkpoint with bnb_4bit_quant_type='nf4', or give that"
            )
        try:
            found[weight] = _matrix(weight, state, tensors)
        except (KeyError, ValueError) as error:
            where = tensors[state].file
            problem = f"there is no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{where}: {weight} is not whole in NF4 codes: {problem}") from error
        beside |= {f"{weight}.{name}" for name in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")}
    return {name: found.get(name, stored) for name, stored in tensors.items() if name not in beside}


def _matrix(weight: str, state: str, tensors: Mapping[str, Stored]) -> Coded:
    """Raises KeyError for a tensor that is missing, ValueError for one that does not fit."""
    told = _told(tensors[state])
    shape, block, group = tuple(told["shape"]), told["blocksize"], told.get("nested_blocksize")
    numel = math.prod(shape)
    codes, scales = -(-numel // 2), -(-numel // block)
    wanted = {"": (None, codes), ".absmax": ("F32" if group is None else "U8", scales), ".quant_map": ("F32", 16)}
    if group is not None:
        wanted |= {".nested_absmax": ("F32", -(-scales // group)), ".nested_quant_map": ("F32", 256)}
    parts = []
    for name, (dtype, count) in wanted.items():
        part = tensors[weight + name]
        size = part.end - part.start if dtype is None else math.prod(part.shape)
        if size != count or dtype not in (None, part.dtype):
            raise ValueError(
                f"{weight}{name} holds {size} values of {part.dtype}, expected {count} of {dtype or 'bytes'}"
            )
        parts.append(part)
    first = parts[0]
    return Coded(
        first.file, first.identity, _DTYPES[told["dtype"]], shape, first.start, first.end,
        parts=(*parts, tensors[state]), block=block, group=group, mean=float(told.get("nested_offset", 0.0)),
    )  # fmt: skip


def _told(state: Stored) -> dict[str, Any]:
    """The JSON of a state, judged."""
    if state.dtype != "U8" or state.end - state.start > _LARGEST_STATE:
        raise ValueError(f"its state is {state.end - state.start} bytes of {state.dtype}")
    told = parse_json(bytes(state.bytes()))
    if not isinstance(told, dict):
        raise ValueError("its state is no JSON object")
    shape = told.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 < n < 2**31 for n in shape):
        raise ValueError(f"its shape is {shape!r:.80}, expected that of a matrix")
    nested = "nested_blocksize" in told
    for key, known in (
        ("quant_type", ("nf4",)),
        ("dtype", tuple(_DTYPES)),
        ("blocksize", _BLOCKS),
        *([("nested_blocksize", _BLOCKS), ("nested_dtype", ("float32",))] if nested else []),
    ):
        if isinstance(told.get(key), bool) or told.get(key) not in known:
            raise ValueError(f"its {key} is {told.get(key)!r:.80}, expected one of {', '.join(map(str, known))}")
    offset = told.get("nested_offset")
    if nested and not (isinstance(offset, float) and math.isfinite(offset)):
        raise ValueError(f"its nested_offset is {offset!r:.80}, expected a number")
    return told
