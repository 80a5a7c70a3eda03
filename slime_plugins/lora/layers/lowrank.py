"""The low-rank path as two autograd taps around an untouched base linear, where ``fused`` cannot be.

    x ----+--------------> base ------> y0 --+--> y = y0 + s h B^T     (in place on y0)
          +-- A --> h --[collective]-- h ----+

``down`` and ``up`` sit in series with the base, not beside it. So the input gradient of the low-rank path is
accumulated into the base's input gradient, its output into the base's output, the scale falls on the rank-sized
side, and the only activation kept is the local input shard and the rank-sized h. The base may be any module.

The collective on h (n tokens on the tensor-parallel group, r rank) starts before the base runs and is waited for after
it, forward and backward. Where A sees what the base hands out (TransformerEngine's fused norm), the base has run
before h is there, and its backward cannot start before h's gradient has been exchanged: nothing overlaps then.

    base          A               B               h forward             dh backward           partial over TP
    column        [r, I] repl.    [O/T, r]        -                     all-reduce n*r        -
    column + SP   [r, I] repl.    [O/T, r]        all-gather n*r        reduce-scatter n*r    dA
    row           [r, I/T]        [O, r] repl.    all-reduce n*r        -                     -
    row + SP      [r, I/T]        [O, r] repl.    reduce-scatter n*r    all-gather n*r        dB
    column, out.  [r, I] repl.    [O/T, r]        -                     (all-reduce n*r)      -
    row, outside  [r, I/T]        [O, r] repl.    (all-reduce n*r)      -                     -

outside: the base leaves its own exchange to its caller (experts under expert tensor parallelism, overlapped shared
experts), which sums the partial outputs or input gradients, ours with them. What we sum is a copy, for dA or dB alone.

Shape letters: N tokens (sequence * batch) on this rank, I/O this rank's input/output features, R = rank * stacked As,
E experts on this rank. A product of stacked experts has the same form with E in front of A and B (see ``grouped``).
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

    ``kind``: none, sum (all-reduce), gather (all-gather of tokens), scatter (reduce-scatter of tokens), or
    sum_apart (all-reduce of a copy, for a weight gradient; the activation path keeps what it has).
    """

    _work: Any
    _result: torch.Tensor | None
    _source: torch.Tensor | None

    def __init__(self, kind: str, group: Any) -> None:
        self.kind, self.group = kind, group
        self._forget()

    def start(self, h: torch.Tensor) -> torch.Tensor:
        """Begin on a contiguous [tokens, R] tensor. Returns the buffer of the activation path after ``finish``."""
        self._source, self._result = h, h  # the source must outlive the exchange
        if h.numel() == 0:
            return h  # no tokens here, then none on the other ranks either
        if self.kind == "sum":
            self._work = dist.all_reduce(h, group=self.group, async_op=True)
        elif self.kind == "sum_apart":
            self._result = summed = h.clone()
            self._work = dist.all_reduce(summed, group=self.group, async_op=True)
        elif self.kind == "gather":
            self._result = whole = h.new_empty(h.shape[0] * self.group.size(), h.shape[1])
            self._work = dist.all_gather_into_tensor(whole, h, group=self.group, async_op=True)
        elif self.kind == "scatter":
            if h.shape[0] % self.group.size():
                raise ValueError(f"{h.shape[0]} tokens do not divide by tensor-parallel size {self.group.size()}")
            self._result = part = h.new_empty(h.shape[0] // self.group.size(), h.shape[1])
            self._work = dist.reduce_scatter_tensor(part, h, group=self.group, async_op=True)
        assert self._result is not None
        return h if self.kind == "sum_apart" else self._result

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Wait. Returns h for the activation path and h for the gradient of the replicated matrix."""
        if self._work is not None:
            self._work.wait()
        summed, source = self._result, self._source
        assert summed is not None and source is not None, "finished before it was started"
        self._forget()
        return source if self.kind == "sum_apart" else summed, summed

    def _forget(self) -> None:
        self._work = self._result = self._source = None


class Dense:
    """The products of one A [R, I] and B [O, R] with all tokens. Outputs may be [runs, N, length] views of y."""

    @staticmethod
    def down(x_NI, A_RI):
        return x_NI @ A_RI.t()

    @staticmethod
    def dx(dh_NR, A_RI):
        return dh_NR @ A_RI

    @staticmethod
    def add_dx(dx_NI, dh_NR, A_RI) -> None:
        dx_NI.addmm_(dh_NR, A_RI)

    @staticmethod
    def dA(dh_NR, x_NI):
        return dh_NR.t() @ x_NI

    @staticmethod
    def add_y(y, h_NR, B_OR, scaling: float) -> None:
        if y.dim() == 2:
            y.addmm_(h_NR, B_OR.t(), alpha=scaling)
        else:
            y.baddbmm_(h_NR.expand(y.shape[0], -1, -1), _runs(B_OR, y).transpose(1, 2), alpha=scaling)

    @staticmethod
    def dh(dy, B_OR, scaling: float):
        if dy.dim() == 2:
            return scaled_mm(dy, B_OR, scaling)
        return torch.bmm(dy, _runs(B_OR, dy)).sum(0).mul_(scaling)

    @staticmethod
    def dB(dy, h_NR, scaling: float):
        if dy.dim() == 2:
            return outer(dy, h_NR, scaling)
        dB_CRL = torch.bmm(h_NR.t().expand(dy.shape[0], -1, -1), dy)
        return dB_CRL.mul_(scaling).transpose(1, 2).reshape(-1, h_NR.shape[1])


def scaled_mm(a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """scaling * a b in one kernel."""
    return torch.addmm(a.new_empty(1), a, b, beta=0, alpha=scaling)


def outer(a_NK: torch.Tensor, b_NM: torch.Tensor, scaling: float) -> torch.Tensor:
    """scaling * a^T b [K, M], contiguous, or AccumulateGrad would copy it."""
    if a_NK.is_cuda or a_NK.shape[1] <= b_NM.shape[1]:
        return scaled_mm(a_NK.t(), b_NM, scaling)
    # A product with few rows, not few columns, is twice as fast on a CPU.
    product = a_NK.new_empty(a_NK.shape[1], b_NM.shape[1])
    torch.addmm(a_NK.new_empty(1), b_NM.t(), a_NK, beta=0, alpha=scaling, out=product.t())
    return product


def _runs(B_OR: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """B's rows as [count, length, R], to go with the [count, N, length] view of ``Part.columns``."""
    return B_OR.view(y.shape[0], y.shape[2], B_OR.shape[1])


class _Down(torch.autograd.Function):
    """h = x A^T with the forward collective started; backward adds dh A to the gradient of the base's input."""

    @staticmethod
    def forward(ctx, x, A, product, forward_exchange, backward_exchange):
        ctx.set_materialize_grads(False)  # an unused x would get a full-width gradient of zeros
        x_NI = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(x_NI, A)
        ctx.product, ctx.backward_exchange, ctx.shape = product, backward_exchange, x.shape
        h_NR = forward_exchange.start(product.down(x_NI, A))
        # A new tensor on the same storage: returning x itself would make a view that nobody may write to in place.
        return x.detach(), h_NR

    @staticmethod
    @once_differentiable
    def backward(ctx, dx, _dh_before_exchange):
        x_NI, A = ctx.saved_tensors
        dh_NR, dh_for_A = ctx.backward_exchange.finish()
        dA = ctx.product.dA(dh_for_A, x_NI) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, dA, None, None, None
        if dx is None:
            return ctx.product.dx(dh_NR, A).view(ctx.shape), dA, None, None, None
        # The base alone has seen this x, so its gradient is ours to add to: no second full-width buffer.
        dx = dx.contiguous()
        ctx.product.add_dx(dx.view_as(x_NI), dh_NR, A)
        return dx, dA, None, None, None


class _Up(torch.autograd.Function):
    """y += s h B^T in place on the base's output; backward starts the backward collective on dh."""

    @staticmethod
    def forward(ctx, y0, _h_in_flight, B, blocks, product, forward_exchange, backward_exchange):
        h_NR, h_for_B = forward_exchange.finish()
        ctx.save_for_backward(h_for_B, B)
        ctx.blocks, ctx.product, ctx.backward_exchange = blocks, product, backward_exchange
        y = y0.detach()  # same storage and version counter; a view autograd does not follow, so it may be written to
        y_NO = y.view(-1, y.shape[-1])
        for block in blocks:
            product.add_y(block.out.columns(y_NO), h_NR[:, block.cols], B[..., block.rows, :], block.scaling)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        h_NR, B = ctx.saved_tensors
        product = ctx.product
        dy_NO = dy.reshape(-1, dy.shape[-1])
        dh_NR = torch.zeros_like(h_NR) if len(ctx.blocks) > 1 else None
        dB = []
        for block in ctx.blocks:
            dy_block = block.out.columns(dy_NO)
            dh = product.dh(dy_block, B[..., block.rows, :], block.scaling)
            if dh_NR is None:
                dh_NR = dh
            else:
                dh_NR[:, block.cols] += dh
            if ctx.needs_input_grad[2]:
                dB.append(product.dB(dy_block, h_NR[:, block.cols], block.scaling))
        # Autograd wants a gradient of h's shape; the exchanged one, of other tokens, reaches ``_Down`` through the
        # exchange.
        ctx.backward_exchange.start(dh_NR)
        return dy, dh_NR, _concatenated(dB), None, None, None, None


def _concatenated(blocks: list[torch.Tensor]) -> torch.Tensor | None:
    """Blocks cover the rows of B in order."""
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-2) if blocks else None


def down(x: torch.Tensor, x_dropped: torch.Tensor | None, A, exchanges, product=Dense):
    """First tap: returns the input to hand to the base, and h [N, R] (valid after the base has run).

    Args:
        x: input of the base, [..., I].
        x_dropped: what A sees if that is not x (dropout, or a normalised input the base does not return).
        product: which tokens meet which A; ``Dense`` or a ``grouped.Segments``.
    """
    if x_dropped is None and x.requires_grad:
        return _Down.apply(x, A, product, *exchanges)
    # The gradient, if any, flows through x_dropped: then the base keeps its own x. A base input that needs no
    # gradient must not be given one, or the base would compute it.
    _, h_NR = _Down.apply(x if x_dropped is None else x_dropped, A, product, *exchanges)
    return x, h_NR


def up(y0: torch.Tensor, h_NR: torch.Tensor, B, blocks, exchanges, product=Dense) -> torch.Tensor:
    """Second tap: y0 [..., O] + sum over blocks, written into y0's storage."""
    return _Up.apply(y0, h_NR, B, blocks, product, *exchanges)
