"""The low-rank products of stacked experts. Rows of x belong to one expert each, sorted by expert.

One grouped product per step, no loop over experts in Python and none over tokens:

    grouped_mm     torch's grouped matrix product; the path wherever it takes the operands
    padded         bmm over experts padded to the longest; for a torch, dtype or alignment that grouped_mm refuses

What is added to a wide tensor (y, dx) never becomes a second one of its size: an expert of many rows is a product of
its own, which adds as it goes; the others are taken together, some rows at a time.

Shape letters as in ``lowrank``: N tokens of all experts, E experts, I/O/R features. An expert may have no token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

_grouped_mm: Any = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
_ALIGNMENT = 16  # bytes: of every stride of an operand

LARGE = 2048
"""Rows from which an expert is a product of its own: those take a GPU longer than the launch of a kernel."""
CHUNK = 16384
"""Rows of smaller experts that are taken together: what they add is a temporary of so many rows."""


class Segments:
    """Products of [N, ...] rows with the matrix of the expert that each row belongs to; as ``lowrank.Dense``.

    Args:
        splits: rows per expert, on the host; their sum is N.
    """

    def __init__(self, splits: Sequence[int], device: torch.device) -> None:
        self._splits, self._device = list(splits), device

    def down(self, x_NI, A_ERI):
        return self._rows_times(x_NI, A_ERI.transpose(1, 2))

    def dx(self, dh_NR, A_ERI):
        return self._rows_times(dh_NR, A_ERI)

    def add_dx(self, dx_NI, dh_NR, A_ERI) -> None:
        self._add_rows_times(dx_NI, dh_NR, A_ERI, 1.0)

    def dA(self, dh_NR, x_NI):
        return self._outer(dh_NR, x_NI)

    def add_y(self, y_NO, h_NR, B_EOR, scaling: float) -> None:
        self._add_rows_times(y_NO, h_NR, B_EOR.transpose(1, 2), scaling)

    def dh(self, dy_NO, B_EOR, scaling: float):
        return self._rows_times(dy_NO, B_EOR).mul_(scaling)

    def dB(self, dy_NO, h_NR, scaling: float):
        if dy_NO.is_cuda:
            return self._outer(dy_NO, h_NR).mul_(scaling)
        # A product with few rows, not few columns, is twice as fast on a CPU.
        return self._outer(h_NR, dy_NO).mul_(scaling).transpose(1, 2)

    def _rows_times(self, a_NK: torch.Tensor, b_EKM: torch.Tensor) -> torch.Tensor:
        """Row n times its expert's matrix: [N, M]."""
        if a_NK.shape[0] == 0:
            return a_NK.new_zeros(0, b_EKM.shape[2])
        if takes_grouped_mm(a_NK, b_EKM):
            return _grouped_mm(a_NK, b_EKM, offs=self._offsets)
        return self._unpad(torch.bmm(self._pad(a_NK), b_EKM))

    def _add_rows_times(self, into_NM: torch.Tensor, a_NK: torch.Tensor, b_EKM: torch.Tensor, scaling: float) -> None:
        """into += scaling * (row n times its expert's matrix), in place."""
        for experts, rows, part in self._parts:
            if part is None:
                into_NM[rows].addmm_(a_NK[rows], b_EKM[experts.start], alpha=scaling)
            else:
                into_NM[rows].add_(part._rows_times(a_NK[rows], b_EKM[experts]), alpha=scaling)

    @cached_property
    def _parts(self) -> list[tuple[slice, slice, Segments | None]]:
        """Consecutive experts, their rows, and the products of these; None for one expert alone."""
        parts: list[tuple[slice, slice, Segments | None]] = []
        first = row = 0
        while first < len(self._splits):
            last, rows = first + 1, self._splits[first]
            if rows < LARGE:
                while last < len(self._splits) and self._splits[last] < LARGE and rows + self._splits[last] <= CHUNK:
                    rows += self._splits[last]
                    last += 1
            experts, whole = slice(first, last), last - first == len(self._splits)
            together = self if whole else Segments(self._splits[experts], self._device)
            if rows:
                alone = self._splits[first] >= LARGE
                parts.append((experts, slice(row, row + rows), None if alone else together))
            first, row = last, row + rows
        return parts

    def _outer(self, a_NK: torch.Tensor, b_NM: torch.Tensor) -> torch.Tensor:
        """Sum over each expert's rows of a^T b: [E, K, M], zero for an expert without rows."""
        if a_NK.shape[0] == 0:
            return a_NK.new_zeros(len(self._splits), a_NK.shape[1], b_NM.shape[1])
        if not takes_grouped_mm(a_NK, b_NM):
            return torch.bmm(self._pad(a_NK).transpose(1, 2), self._pad(b_NM))
        product = _grouped_mm(a_NK.t(), b_NM, offs=self._offsets)
        if 0 in self._splits and a_NK.is_cuda:  # the kernel need not write what it has nothing to sum for
            product.masked_fill_(self._empty[:, None, None], 0)
        return product

    @cached_property
    def _offsets(self) -> torch.Tensor:
        """Where each expert's rows end: int32 [E]."""
        return self._to_device(torch.tensor(self._splits).cumsum(0).to(torch.int32))

    @cached_property
    def _empty(self) -> torch.Tensor:
        return self._to_device(torch.tensor(self._splits) == 0)

    @cached_property
    def _places(self) -> torch.Tensor:
        """Row of each token among [E * longest] padded rows: int64 [N]."""
        splits, longest = torch.tensor(self._splits), max(self._splits)
        shift = torch.arange(len(self._splits)) * longest - (splits.cumsum(0) - splits)
        return self._to_device(torch.arange(int(splits.sum())) + shift.repeat_interleave(splits))

    def _pad(self, a_NK: torch.Tensor) -> torch.Tensor:
        padded = a_NK.new_zeros(len(self._splits) * max(self._splits), a_NK.shape[1])
        return padded.index_copy_(0, self._places, a_NK).view(len(self._splits), -1, a_NK.shape[1])

    def _unpad(self, a_ELK: torch.Tensor) -> torch.Tensor:
        return a_ELK.flatten(0, 1)[self._places]

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)


_last: list[Segments] = []


def segments(splits: Sequence[int], device: torch.device) -> Segments:
    """The ``Segments`` of these splits: the one of the last call if they are equal, as a layer's two linears' are.

    So that what it builds and sends to the device is built and sent once a layer.
    """
    if not _last or _last[0]._splits != list(splits) or _last[0]._device != device:
        _last[:] = [Segments(splits, device)]
    return _last[0]


def takes_grouped_mm(*operands: torch.Tensor) -> bool:
    """Can torch's grouped product take these operands here? A rank of a multiple of 8 (bf16) or 4 (fp32) is needed."""
    if _grouped_mm is None:
        return False
    if operands[0].is_cuda:
        known = all(t.dtype == torch.bfloat16 for t in operands)
    else:  # torch < 2.10 has ``_grouped_mm``, but not for host memory
        known = hasattr(torch.nn.functional, "grouped_mm")
    return known and all(_aligned(t) for t in operands)


def _aligned(t: torch.Tensor) -> bool:
    return t.data_ptr() % _ALIGNMENT == 0 and all(
        stride == 1 or stride * t.element_size() % _ALIGNMENT == 0 for stride in t.stride()
    )
