"""The low-rank path as two autograd taps around an untouched base linear.

    x ----+--------------> base ------> y0 --+--> y = y0 + s h B^T     (in place on y0)
          +-- A --> h --[collective]-- h ----+

``down`` and ``up`` sit in series with the base, not beside it. So the input gradient of the low-rank path is
accumulated into the base's input gradient, its output into the base's output, the scale falls on the rank-sized
side, and the only activation kept is the local input shard and the rank-sized h. The base may be any module.

The collective on h (design section 3; n tokens on the tensor-parallel group, r rank) starts before the base runs and
is waited for after it, forward and backward:

    base          A               B               h forward             dh backward           partial over TP
    column        [r, I] repl.    [O/T, r]        -                     all-reduce n*r        -
    column + SP   [r, I] repl.    [O/T, r]        all-gather n*r        reduce-scatter n*r    dA
    row           [r, I/T]        [O, r] repl.    all-reduce n*r        -                     -
    row + SP      [r, I/T]        [O, r] repl.    reduce-scatter n*r    all-gather n*r        dB

Shape letters: N tokens (sequence * batch) on this rank, I/O this rank's input/output features, R = rank * stacked As.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from slime_plugins.lora.layout import Part


@dataclass(frozen=True)
class Block:
    """One product of the up projection: y[:, out] += scaling * h[:, cols] @ B[rows].T"""

    out: Part
    """Where the block's output features lie in the base's local output."""
    rows: slice
    """Rows of B."""
    cols: slice
    """Columns of h."""
    scaling: float


class Collective:
    """One exchange of h over a tensor-parallel group: started by one tap, finished by the other.

    ``kind``: none, sum (all-reduce), gather (all-gather of tokens) or scatter (reduce-scatter of tokens).
    """

    def __init__(self, kind: str, group: Any) -> None:
        self.kind, self.group = kind, group
        self._work = self._result = self._source = None

    def start(self, h: torch.Tensor) -> torch.Tensor:
        """Begin on a contiguous [tokens, R] tensor. Returns the buffer that holds the result after ``finish``."""
        self._source = self._result = h  # the source must outlive the exchange
        if self.kind == "sum":
            self._work = dist.all_reduce(h, group=self.group, async_op=True)
        elif self.kind == "gather":
            self._result = h.new_empty(h.shape[0] * self.group.size(), h.shape[1])
            self._work = dist.all_gather_into_tensor(self._result, h, group=self.group, async_op=True)
        elif self.kind == "scatter":
            if h.shape[0] % self.group.size():
                raise ValueError(f"{h.shape[0]} tokens do not divide by tensor-parallel size {self.group.size()}")
            self._result = h.new_empty(h.shape[0] // self.group.size(), h.shape[1])
            self._work = dist.reduce_scatter_tensor(self._result, h, group=self.group, async_op=True)
        return self._result

    def finish(self) -> torch.Tensor:
        """Wait, and return the result."""
        if self._work is not None:
            self._work.wait()
        result, self._work, self._result, self._source = self._result, None, None, None
        return result


class _Down(torch.autograd.Function):
    """h = x A^T with the forward collective started; backward adds dh A to the gradient of the base's input."""

    @staticmethod
    def forward(ctx, x, A_RI, forward_exchange, backward_exchange):
        ctx.set_materialize_grads(False)  # an unused x would get a full-width gradient of zeros
        x_NI = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(x_NI, A_RI)
        ctx.backward_exchange, ctx.shape = backward_exchange, x.shape
        h_NR = forward_exchange.start(x_NI @ A_RI.t())
        # A new tensor on the same storage: returning x itself would make a view that nobody may write to in place.
        return x.detach(), h_NR

    @staticmethod
    @once_differentiable
    def backward(ctx, dx, _dh_before_exchange):
        x_NI, A_RI = ctx.saved_tensors
        dh_NR = ctx.backward_exchange.finish()
        dA_RI = dh_NR.t() @ x_NI if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, dA_RI, None, None
        if dx is None:
            return (dh_NR @ A_RI).view(ctx.shape), dA_RI, None, None
        # The base alone has seen this x, so its gradient is ours to add to: no second full-width buffer.
        dx = dx.contiguous()
        dx.view_as(x_NI).addmm_(dh_NR, A_RI)
        return dx, dA_RI, None, None


class _Up(torch.autograd.Function):
    """y += s h B^T in place on the base's output; backward starts the backward collective on dh."""

    @staticmethod
    def forward(ctx, y0, _h_in_flight, B_OR, blocks, forward_exchange, backward_exchange):
        h_NR = forward_exchange.finish()
        ctx.save_for_backward(h_NR, B_OR)
        ctx.blocks, ctx.backward_exchange = blocks, backward_exchange
        y = y0.detach()  # same storage and version counter; a view autograd does not follow, so it may be written to
        y_NO = y.view(-1, y.shape[-1])
        for block in blocks:
            _add_block(block.out.columns(y_NO), h_NR[:, block.cols], B_OR[block.rows], block.scaling)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        h_NR, B_OR = ctx.saved_tensors
        dy_NO = dy.reshape(-1, dy.shape[-1])
        dh_NR = torch.zeros_like(h_NR) if len(ctx.blocks) > 1 else None
        dB_OR = torch.empty_like(B_OR) if ctx.needs_input_grad[2] else None
        for block in ctx.blocks:
            dy_block = block.out.columns(dy_NO)
            dh = _dh_block(dy_block, B_OR[block.rows], block.scaling)
            if dh_NR is None:
                dh_NR = dh
            else:
                dh_NR[:, block.cols] += dh
            if dB_OR is not None:
                _write_dB_block(dB_OR[block.rows], dy_block, h_NR[:, block.cols], block.scaling)
        # Autograd wants a gradient of h's shape; the exchanged one, of other tokens, reaches ``_Down`` beside it.
        ctx.backward_exchange.start(dh_NR)
        return dy, dh_NR, dB_OR, None, None, None


def _runs(B_OR: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """B's rows as [count, length, R], to go with the [count, N, length] view of ``Part.columns``."""
    return B_OR.view(y.shape[0], y.shape[2], B_OR.shape[1])


def _add_block(y, h_NR, B_OR, scaling: float) -> None:
    if y.dim() == 2:
        y.addmm_(h_NR, B_OR.t(), alpha=scaling)
    else:
        y.baddbmm_(h_NR.expand(y.shape[0], -1, -1), _runs(B_OR, y).transpose(1, 2), alpha=scaling)


def _dh_block(dy, B_OR, scaling: float) -> torch.Tensor:
    dh_NR = dy @ B_OR if dy.dim() == 2 else torch.bmm(dy, _runs(B_OR, dy)).sum(0)
    return dh_NR.mul_(scaling)


def _write_dB_block(dB_OR, dy, h_NR, scaling: float) -> None:
    if dy.dim() == 2:
        torch.mm(dy.t(), h_NR, out=dB_OR)
    else:
        torch.bmm(dy.transpose(1, 2), h_NR.expand(dy.shape[0], -1, -1), out=_runs(dB_OR, dy))
    dB_OR.mul_(scaling)


def down(x: torch.Tensor, x_dropped: torch.Tensor | None, A_RI, exchanges) -> tuple[torch.Tensor, torch.Tensor]:
    """First tap: returns the input to hand to the base, and h [N, R] (valid after the base has run).

    Args:
        x: input of the base, [..., I].
        x_dropped: what A sees if that is not x (dropout, or a normalised input the base does not return).
    """
    if x_dropped is None and x.requires_grad:
        return _Down.apply(x, A_RI, *exchanges)
    # The gradient, if any, flows through x_dropped: then the base keeps its own x. A base input that needs no
    # gradient must not be given one, or the base would compute it.
    _, h_NR = _Down.apply(x if x_dropped is None else x_dropped, A_RI, *exchanges)
    return x, h_NR


def up(y0: torch.Tensor, h_NR: torch.Tensor, B_OR, blocks, exchanges) -> torch.Tensor:
    """Second tap: y0 [..., O] + sum over blocks, written into y0's storage."""
    return _Up.apply(y0, h_NR, B_OR, blocks, *exchanges)
