"""A frozen linear and its adapter as one autograd function, with the norm in front where the linear has one.

    y = ln W^T + h Bs^T     h = s ln A^T     ln = norm(x), gathered under sequence parallelism, or x itself

What it saves over the two taps of ``lowrank``, which go around a linear that they do not know:

    kept for the backward   x as it comes, and h. Not the norm's output, which the base does not keep either:
                            RMSNorm is ln = rho x gamma, so dA = s ((rho dh)^T x) gamma. Nor an x that can be made
                            again from what the graph keeps (``remade``)
    adding                  h Bs^T is there first, and the base's product is added to it (beta = 1), the input's
                            gradient likewise. Of one more reading and writing, the reading is then the base product's,
                            which computes meanwhile; and in bf16 the small term is rounded twice, not the large one
    input gradient          dh A is added to the base's own before its exchange and before the norm's backward; a norm
                            of TransformerEngine's takes it as a second gradient, which costs three passes more
    exchanges               none forward: h is taken from the gathered input of a column-parallel linear, and added to
                            the partial output of a row-parallel one, which Megatron sums. Backward, one of the rank's
                            size for a replicated matrix, beside the base's products and its own exchange:

                            column           all-reduce dh          n*r    for dA
                            column + SP      reduce-scatter dh      n*r    for dA, of this rank's tokens; summed once
                            row              all-reduce h           n*r    for dB
                            row + SP         -                             dB is of this rank's h; summed once
    split layouts           one product, with a B that is zero where a projection does not see an A. Rows of zeros cost
                            a GPU nothing: these products move bytes
    gradients               straight into Megatron's ``main_grad``, in its precision (``grad_added_to_main_grad``)

"Summed once": by Megatron over tensor-parallel ranks at the end of a step, as for any parameter with
``sequence_parallel``. Shape letters as in ``lowrank``; P stacked As of rank R, C = P*R.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from slime_plugins.lora.layers.lowrank import scaled_mm
from slime_plugins.lora.layers.main_grad import added, main_grad_of, outer_into
from slime_plugins.lora.layers.remade import remade
from slime_plugins.lora.layers.spec import AdapterSpec


@dataclass(frozen=True)
class Norm:
    """RMSNorm in front of a linear: ln = x rho gamma, rho = rsqrt(mean(x^2) + eps)."""

    gamma: torch.Tensor
    eps: float

    def __call__(self, x_NI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ln [N, I] and rho [N, 1], float32."""
        if x_NI.is_cuda and hasattr(torch.ops.aten, "_fused_rms_norm"):  # one pass; torch has it from 2.9 on
            return torch.ops.aten._fused_rms_norm(x_NI, self.gamma.shape, self.gamma, self.eps)
        x = x_NI.float()
        rho = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return (x * rho * self.gamma.float()).to(x_NI.dtype), rho

    def backward(self, dln_NI: torch.Tensor, x_NI: torch.Tensor, rho: torch.Tensor) -> torch.Tensor:
        """dx [N, I]."""
        if x_NI.is_cuda and hasattr(torch.ops.aten, "_fused_rms_norm_backward"):
            which = [True, False]
            return torch.ops.aten._fused_rms_norm_backward(dln_NI, x_NI, self.gamma.shape, rho, self.gamma, which)[0]
        x, g = x_NI.float(), dln_NI.float() * self.gamma.float()
        dx = rho * g - x * rho.pow(3) * (g * x).mean(-1, keepdim=True)
        return dx.to(x_NI.dtype)


@dataclass(frozen=True)
class Exchange:
    """What a linear and its adapter send over the tensor-parallel group."""

    group: Any
    gathers: bool = False
    """Column under sequence parallelism: the input is gathered, its gradient scattered."""
    sums_dx: bool = False
    """Column without: the input's gradient is summed here, not by the caller."""
    sums_dh: bool = False
    """dh is another on every rank, and dA is to be of their sum."""
    sums_h: bool = False
    """h is another on every rank, and dB is to be of their sum."""

    @classmethod
    def of(
        cls, group: Any, shards: int, parallel: str, *, gathers: bool, sums_dx: bool, summed_once: bool
    ) -> Exchange:
        """``summed_once``: a replicated matrix's gradient may be a part; Megatron sums it at the end of the step."""
        several = shards > 1
        return cls(
            group,
            gathers=gathers and several,
            sums_dx=sums_dx and several,
            sums_dh=several and parallel == "column" and not gathers,
            sums_h=several and parallel == "row" and not summed_once,
        )

    def gather(self, x_NI: torch.Tensor) -> torch.Tensor:
        whole = x_NI.new_empty(x_NI.shape[0] * self.group.size(), x_NI.shape[1])
        dist.all_gather_into_tensor(whole, x_NI.contiguous(), group=self.group)
        return whole

    def scatter(self, dx: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """This rank's rows of the sum, valid once the work is waited for."""
        part = dx.new_empty(dx.shape[0] // self.group.size(), dx.shape[1])
        return part, dist.reduce_scatter_tensor(part, dx, group=self.group, async_op=True)

    def sum(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """The sum, in place, valid once the work is waited for."""
        return tensor, dist.all_reduce(tensor, group=self.group, async_op=True)


class OneProduct:
    """The up projection of a spec as one product with a dense [O, C] matrix.

    B [rows, R] itself where it covers the linear's rows one to one. Else B's rows at their places, in the columns of
    the A that they see, and zeros.
    """

    def __init__(self, spec: AdapterSpec, rows: int) -> None:
        """``rows``: of the base's shard."""
        self._shape = (rows, spec.num_A, spec.rank)
        uniform = len(set(spec.scalings)) == 1
        self.scaling = spec.scalings[0] if uniform else 1.0
        """On h; where projections have different ones they are in the dense matrix."""
        self._places: torch.Tensor | None = None
        self._factors: torch.Tensor | None = None
        if not spec.in_base_order:
            column = [block.cols.start // spec.rank for block in spec.blocks]
            places = [block.out.run_index() * spec.num_A + c for block, c in zip(spec.blocks, column)]
            self._places = torch.cat(places)
        if not uniform:
            factors = [torch.full((block.out.size, 1), block.scaling) for block in spec.blocks]
            self._factors = torch.cat(factors)

    def dense(self, B: torch.Tensor) -> torch.Tensor:
        """[O, C] of B [rows, R]."""
        if self._places is None:
            return B
        rows, stacked, rank = self._shape
        places, factors = self._on(B.device)
        scaled = B if factors is None else B * factors.to(B.dtype)
        return B.new_zeros(rows * stacked, rank).index_copy_(0, places, scaled).view(rows, stacked * rank)

    def dB(self, dense: torch.Tensor) -> torch.Tensor:
        """B's gradient out of the dense matrix's."""
        if self._places is None:
            return dense
        places, factors = self._on(dense.device)
        dB = dense.reshape(-1, self._shape[2]).index_select(0, places)
        return dB if factors is None else dB * factors.to(dB.dtype)

    def _on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Moved once: a model may be built on the CPU and go to its device later."""
        assert self._places is not None
        if self._places.device != device:
            self._places = self._places.to(device)
            self._factors = None if self._factors is None else self._factors.to(device)
        return self._places, self._factors

    @property
    def is_B(self) -> bool:
        return self._places is None


@dataclass(frozen=True)
class Operation:
    """What of one call is no tensor that autograd follows."""

    exchange: Exchange
    norm: Norm | None
    up: OneProduct


class _FusedLinear(torch.autograd.Function):
    """y, of the shape of x but for the last dimension. The weight, its bias and the norm are frozen."""

    @staticmethod
    def forward(ctx, x, W, bias, A, B, operation, again):
        x_NI, rho = x.reshape(-1, x.shape[-1]), None
        ln_NI = x_NI
        if operation.norm is not None:
            ln_NI, rho = operation.norm(x_NI)
        if operation.exchange.gathers:
            ln_NI = operation.exchange.gather(ln_NI)
        ctx.operation, ctx.shape, ctx.parameters = operation, x.shape, (A, B)
        if A is None:
            y_NO = ln_NI.new_zeros(ln_NI.shape[0], W.shape[0])  # the same sum as with a B of zeros
            ctx.save_for_backward(x_NI if rho is not None else None, rho, W)
        else:
            A_CI, B_OC = A.to(x.dtype), operation.up.dense(B.to(x.dtype))
            h_NC = scaled_mm(ln_NI, A_CI.t(), operation.up.scaling)
            y_NO = h_NC @ B_OC.t()
            kept = (x_NI,) if again is None else again.sources
            ctx.make = None if again is None else again.make
            ctx.save_for_backward(rho, W, A_CI, B_OC, h_NC, *kept)
        y_NO.addmm_(ln_NI, W.t())
        if bias is not None:
            y_NO.add_(bias)
        return y_NO.view(-1, *x.shape[1:-1], W.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dy_NO, wants_dx = dy.reshape(-1, dy.shape[-1]), ctx.needs_input_grad[0]
        if ctx.parameters[0] is None:
            x_NI, rho, W = ctx.saved_tensors
            finish = _dx(ctx, dy_NO @ W, x_NI, rho) if wants_dx else None
            return finish() if finish else None, None, None, None, None, None, None
        rho, W, A_CI, B_OC, h_NC, *kept = ctx.saved_tensors
        exchange, up = ctx.operation.exchange, ctx.operation.up
        dh_NC = dy_NO @ B_OC
        dh_for_A, h_for_B, sent = dh_NC, h_NC, None
        if exchange.gathers:
            dh_for_A, sent = exchange.scatter(dh_NC)
        elif exchange.sums_dh:
            dh_for_A, sent = exchange.sum(dh_NC.clone())
        elif exchange.sums_h:
            h_for_B, sent = exchange.sum(h_NC.clone())
        finish = None
        if wants_dx:
            dln_NI = scaled_mm(dh_NC, A_CI, up.scaling).addmm_(dy_NO, W)
            finish = _dx(ctx, dln_NI, kept[0], rho)  # behind a norm kept[0] is x; else it is not looked at
        if sent is not None:
            sent.wait()
        A, B = ctx.parameters
        dB = _dB(B, dy_NO, h_for_B, up) if ctx.needs_input_grad[4] else None
        dA = None
        if ctx.needs_input_grad[3]:
            x_NI = ctx.make(*kept).reshape(-1, A_CI.shape[1]) if ctx.make else kept[0]
            dA = _dA(A, dh_for_A, x_NI, up.scaling, rho, ctx.operation.norm)
        return finish() if finish else None, None, None, dA, dB, None, None


def _dx(ctx, dln_NI: torch.Tensor, x_NI: torch.Tensor, rho: torch.Tensor | None):
    """Start the exchange of the input's gradient; what is returned finishes it."""
    exchange, norm, sent = ctx.operation.exchange, ctx.operation.norm, None
    if exchange.gathers:
        dln_NI, sent = exchange.scatter(dln_NI)
    elif exchange.sums_dx:
        dln_NI, sent = exchange.sum(dln_NI)

    def finish() -> torch.Tensor:
        if sent is not None:
            sent.wait()
        dx = dln_NI if norm is None else norm.backward(dln_NI, x_NI, rho)
        return dx.view(ctx.shape)

    return finish


def _dA(A, dh_NC, x_NI, scaling: float, rho: torch.Tensor | None, norm: Norm | None) -> torch.Tensor:
    """scaling * dh^T ln [C, I], of the A that was given: added to its ``main_grad`` where that can be."""
    if rho is None or norm is None:
        return outer_into(A, dh_NC, x_NI, scaling)
    dA = (dh_NC * rho.to(dh_NC.dtype)).t() @ x_NI
    main_grad = main_grad_of(A)
    if main_grad is None:
        return (dA * norm.gamma).mul_(scaling).to(A.dtype)
    main_grad.addcmul_(dA, norm.gamma, value=scaling)
    return added(A)


def _dB(B, dy_NO, h_NC, up: OneProduct) -> torch.Tensor:
    """dy^T h, of the B that was given; h is scaled. The same."""
    if up.is_B:
        return outer_into(B, dy_NO, h_NC, 1.0)
    dB, main_grad = up.dB(dy_NO.t() @ h_NC), main_grad_of(B)
    if main_grad is None:
        return dB.to(B.dtype)
    main_grad.add_(dB)
    return added(B)


class Fused:
    """How one linear runs as one autograd function."""

    def __init__(self, linear: Any) -> None:
        self._linear = linear
        self._ups = [(linear.lora, OneProduct(linear.lora, linear.lora_base.shape[0]))]

    @property
    def _remakes(self) -> bool:
        """Is an input that can be made again let go? Not where the layer, or its MLP, is made again in the backward
        anyway: it lives no longer than that. Nor where what the graph keeps may be on its way to the host."""
        config = self._linear.lora_base.config
        again = config.recompute_granularity == "full" or (
            config.recompute_granularity == "selective" and "mlp" in (config.recompute_modules or ())
        )
        return not again and not getattr(config, "fine_grained_activation_offloading", False)

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        norm: Norm | None = None,
        gathers: bool = False,
        sums_dx: bool = False,
    ) -> torch.Tensor:
        """The output [..., O]; of a row-parallel linear the partial output, not summed. Adapters off: the base alone.

        Args:
            weight: frozen, [O, I].
            bias: added here; None where the caller does, or there is none.
            gathers, sums_dx: as in ``Exchange``.
        """
        linear = self._linear
        exchange = Exchange.of(
            linear.lora_group,
            linear.lora_base.shards,
            linear.lora.parallel,
            gathers=gathers,
            sums_dx=sums_dx,
            summed_once=linear.lora_base.tokens == "sequence",
        )
        A, B = (linear.lora_A, linear.lora_B) if linear.lora_enabled else (None, None)
        again = remade(x) if A is not None and norm is None and self._remakes else None
        return _FusedLinear.apply(x, weight, bias, A, B, Operation(exchange, norm, self._up(linear.lora)), again)

    def _up(self, spec: AdapterSpec) -> OneProduct:
        """Of the adapter that the linear wears: a teacher's may be another (``objectives.teacher``)."""
        for known, up in self._ups:
            if known is spec:
                return up
        up = OneProduct(spec, self._linear.lora_base.shape[0])
        self._ups = [*self._ups[-1:], (spec, up)]
        return up
