"""NF4 codes and their scales, as bitsandbytes computes them. Its functional API does the arithmetic; no process group.

Shapes: O rows, I columns, N = I / 64 scales of a row. A projection's scales, row after row in Hugging Face order, are
one vector to bitsandbytes: it takes off their mean and quantises them to 8 bits in groups of 256. So a shard's scales
are nested with the projection's others or not at all: per shard, a third of bf16 weights would come out different.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch

from slime_plugins.lora.base.quantization import BLOCK, GROUP
from slime_plugins.lora.errors import UsageError


@cache
def bitsandbytes() -> Any:
    """``bitsandbytes.functional``, imported on first use. Raises UsageError where it is not installed."""
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise UsageError(f"a 4-bit base needs bitsandbytes ({error}); pip install 'slime-lora[quant]'") from None
    return functional


def encode(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[O, I] float32 or 16-bit -> codes uint8 [O, I/2], scales float32 [O, N]. I is a multiple of 64."""
    codes, state = bitsandbytes().quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=False
    )
    rows, columns = weight.shape
    return codes.view(rows, columns // 2), state.absmax.view(rows, columns // BLOCK)


def decode(codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse, [O, I] in ``dtype``, in new memory."""
    library = bitsandbytes()
    shape = torch.Size((codes.shape[0], 2 * codes.shape[1]))
    state = library.QuantState(absmax=absmax.reshape(-1), shape=shape, dtype=dtype, blocksize=BLOCK, quant_type="nf4")
    return library.dequantize_4bit(codes.view(-1, 1), quant_state=state)


class Scales(NamedTuple):
    """A shard's scales in 8 bits: of rows that belong to P projections, whose groups of 256 are numbered through."""

    codes: torch.Tensor
    """uint8 [O, N]"""
    first: torch.Tensor
    """int32 [O]: number of a row's first scale among all projections', each projection's from a whole group on."""
    groups: torch.Tensor
    """float32: the scale of every group."""
    means: torch.Tensor
    """float32 [P]"""
    ends: torch.Tensor
    """int32 [P]: where each projection's numbers end."""

    def decode(self) -> torch.Tensor:
        """float32 [O, N]"""
        numbers = self.first[:, None] + torch.arange(self.codes.shape[1], dtype=torch.int32, device=self.first.device)
        means = self.means[torch.bucketize(self.first, self.ends, right=True)]
        code = _dynamic_map(self.codes.device)
        return code[self.codes.int()] * self.groups[numbers // GROUP] + means[:, None]


def nest(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All scales of one projection, float32 [n], in Hugging Face order -> codes uint8 [n], groups float32, mean.

    As ``quantize_4bit(compress_statistics=True)`` does.
    """
    mean = absmax.mean()
    codes, state = bitsandbytes().quantize_blockwise(absmax - mean, blocksize=GROUP)
    return codes, state.absmax, mean


def whole_scales(absmax: torch.Tensor) -> Scales:
    """Of a projection that is not cut, from its scales float32 [O, N]."""
    rows, columns = absmax.shape
    codes, groups, mean = nest(absmax.reshape(-1))
    first = torch.arange(rows, dtype=torch.int32, device=absmax.device) * columns
    ends = torch.tensor([math.ceil(absmax.numel() / GROUP) * GROUP], dtype=torch.int32, device=absmax.device)
    return Scales(codes.view(absmax.shape), first, groups, mean[None], ends)


@cache
def _dynamic_map(device: torch.device) -> torch.Tensor:
    """bitsandbytes' 256 numbers of 8 bits."""
    return bitsandbytes().create_dynamic_map().to(device)
