"""Linear, LayerNormLinear, GroupedLinear and norms. Shape letters: N local tokens, I input, O output features."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F

from .distributed import allreduce, gather_along_first_dim, reduce_scatter_along_first_dim


def _clear(*tensors: torch.Tensor | None) -> None:
    """Free a tensor whoever else holds it, as TE's ``clear_tensor_data``: a shared tensor becomes empty."""
    for tensor in tensors:
        if tensor is not None:
            tensor.data = tensor.new_empty(0)


def norm(x, weight, bias, module):
    scale = weight.float() + 1.0 if module.zero_centered_gamma else weight.float()
    if module.normalization == "RMSNorm":
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + module.eps) * scale
    else:
        normed = F.layer_norm(x.float(), x.shape[-1:], scale, None if bias is None else bias.float(), module.eps)
    return normed.to(x.dtype)


def norm_backward(grad, x, weight, bias, module):
    """Gradients of x, weight and, where there is one, bias."""
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    with torch.enable_grad():
        again = norm(*(inputs if bias is not None else [*inputs, None]), module)
    return (*torch.autograd.grad(again, inputs, grad), None)[:3]


def _forward_gemm(x_NI, weight, bias, module):
    """Output of the local weight with TE's communication. Returns it and the gathered input, if it was gathered."""
    gathers = module.parallel_mode == "column" and module.sequence_parallel
    total = gather_along_first_dim(x_NI, module.tp_group) if gathers else x_NI
    out = F.linear(total, weight, bias)
    if module.parallel_mode == "row" and module.tp_size > 1:
        communicate = reduce_scatter_along_first_dim if module.sequence_parallel else allreduce
        out = communicate(out, module.tp_group)
    return out, total if gathers else None


def _backward_gemm(grad_NO, x_NI, weight, module):
    """dgrad and wgrad (None if the weight is frozen or its gradient went to ``main_grad``)."""
    if module.parallel_mode == "row" and module.sequence_parallel:
        grad_NO = gather_along_first_dim(grad_NO, module.tp_group)
    dgrad, wgrad = grad_NO @ weight, None
    if weight.requires_grad:
        gathers = module.parallel_mode == "column" and module.sequence_parallel
        wgrad = grad_NO.t() @ (gather_along_first_dim(x_NI, module.tp_group) if gathers else x_NI)
        wgrad = _accumulate(weight, wgrad, module.fuse_wgrad_accumulation)
    if module.parallel_mode == "column" and module.tp_size > 1:
        communicate = reduce_scatter_along_first_dim if module.sequence_parallel else allreduce
        dgrad = communicate(dgrad, module.tp_group)
    return dgrad, wgrad, grad_NO


def _accumulate(weight, wgrad, fused: bool):
    """With fusion the gradient goes to ``main_grad``, and Megatron's hook sees a dummy of undefined content."""
    if not fused:
        return wgrad
    weight.main_grad.add_(wgrad)
    weight.grad_added_to_main_grad = True
    return torch.full_like(wgrad, float("nan"))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inp, weight, bias, module):
        x_NI = inp.view(-1, module.in_features)
        out, gathered = _forward_gemm(x_NI, weight, bias, module)
        _clear(gathered)
        ctx.save_for_backward(x_NI if weight.requires_grad else None, weight)
        ctx.module, ctx.shape, ctx.use_bias = module, inp.shape, bias is not None
        return out.view(-1, *inp.shape[1:-1], module.out_features)

    @staticmethod
    def backward(ctx, grad):
        x_NI, weight = ctx.saved_tensors
        dgrad, wgrad, grad_NO = _backward_gemm(grad.reshape(-1, grad.shape[-1]), x_NI, weight, ctx.module)
        return dgrad.view(ctx.shape), wgrad, grad_NO.sum(0) if ctx.use_bias else None, None


class _LayerNormLinear(torch.autograd.Function):
    """Two outputs; the second (None if not asked for) is the local normalised input, with a gradient of its own."""

    @staticmethod
    def forward(ctx, inp, norm_weight, norm_bias, weight, bias, module):
        x_NI = inp.view(-1, module.in_features)
        normed = norm(x_NI, norm_weight, norm_bias, module)
        out, gathered = _forward_gemm(normed, weight, bias, module)
        _clear(gathered)
        ctx.returned = module.return_layernorm_output
        returned = normed.view(inp.shape) if ctx.returned else None
        if not weight.requires_grad and not ctx.returned:
            _clear(normed)
        ctx.save_for_backward(x_NI, norm_weight, norm_bias, weight, normed)
        ctx.weight = weight  # for its attributes alone
        ctx.module, ctx.shape, ctx.use_bias = module, inp.shape, bias is not None
        return out.view(-1, *inp.shape[1:-1], module.out_features), returned

    @staticmethod
    def backward(ctx, grad, grad_normed):
        x_NI, norm_weight, norm_bias, weight, normed = ctx.saved_tensors
        dgrad, wgrad, grad_NO = _backward_gemm(grad.reshape(-1, grad.shape[-1]), normed, weight, ctx.module)
        if ctx.returned:
            dgrad = dgrad + grad_normed.reshape(dgrad.shape)
        dx, dgamma, dbeta = norm_backward(dgrad, x_NI, norm_weight, norm_bias, ctx.module)
        return dx.view(ctx.shape), dgamma, dbeta, wgrad, grad_NO.sum(0) if ctx.use_bias else None, None


class _GroupedLinear(torch.autograd.Function):
    """Consecutive blocks of rows through one weight each; never communicates. An empty block is allowed."""

    @staticmethod
    def forward(ctx, inp, m_splits, module, *weights_and_biases):
        weights, biases = weights_and_biases[: module.num_gemms], weights_and_biases[module.num_gemms :]
        blocks = inp.view(-1, module.in_features).split(m_splits)
        biases = biases if module.apply_bias else [None] * module.num_gemms
        out = torch.cat([F.linear(x, w, b) for x, w, b in zip(blocks, weights, biases)])
        ctx.save_for_backward(inp if weights[0].requires_grad else None, *weights)
        ctx.module, ctx.m_splits, ctx.shape = module, m_splits, inp.shape
        return out.view(-1, *inp.shape[1:-1], module.out_features)

    @staticmethod
    def backward(ctx, grad):
        inp, *weights = ctx.saved_tensors
        module, grads = ctx.module, grad.reshape(-1, grad.shape[-1]).split(ctx.m_splits)
        dgrad = torch.cat([g @ w for g, w in zip(grads, weights)]).view(ctx.shape)
        wgrads = [None] * module.num_gemms
        if weights[0].requires_grad:
            blocks = inp.view(-1, module.in_features).split(ctx.m_splits)
            wgrads = [
                _accumulate(w, g.t() @ x, module.fuse_wgrad_accumulation) for g, x, w in zip(grads, blocks, weights)
            ]
        dbiases = [g.sum(0) if module.apply_bias else None for g in grads]
        return dgrad, None, None, *wgrads, *dbiases


class TransformerEngineBaseModule(torch.nn.Module):
    """What the linears share: sizes per rank, marked parameters, and an empty ``_extra_state``."""

    def set_tensor_parallel_group(self, tp_group) -> None:
        self.tp_group, self.tp_group_initialized = tp_group, True

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state) -> None:
        pass

    def _setup(self, in_features, out_features, sequence_parallel, fuse, tp_group, tp_size, bias, return_bias, mode):
        self.set_tensor_parallel_group(tp_group)
        self.tp_size = tp_group.size() if tp_group is not None else tp_size
        self.in_features = in_features // (self.tp_size if mode == "row" else 1)
        self.out_features = out_features // (self.tp_size if mode == "column" else 1)
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.fuse_wgrad_accumulation, self.parallel_mode = fuse, mode
        self.use_bias, self.return_bias, self.apply_bias = bias, return_bias, bias and not return_bias

    def _add_weight(self, dtype, device, init_method, tracker, tracker_name, suffix="") -> None:
        """``weight`` and, with a bias, ``bias``. TE marks every weight as sharded, also where it is not."""
        weight = torch.nn.Parameter(torch.empty(self.out_features, self.in_features, dtype=dtype, device=device))
        fork = contextlib.nullcontext()
        if tracker is not None:
            fork = tracker().fork(tracker_name) if tracker_name else tracker().fork()
        with torch.no_grad(), fork:
            (init_method or torch.nn.init.normal_)(weight)
        _mark(weight, 1 if self.parallel_mode == "row" else 0)
        setattr(self, f"weight{suffix}", weight)
        bias = torch.empty(0, dtype=dtype)
        if self.use_bias:
            bias = torch.nn.Parameter(torch.zeros(self.out_features, dtype=dtype, device=device))
            if self.parallel_mode == "row":
                bias.sequence_parallel = self.sequence_parallel
            elif self.parallel_mode == "column":
                _mark(bias, 0)
        setattr(self, f"bias{suffix}", bias)


def _mark(parameter, dim: int) -> None:
    parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, dim, 1


class Linear(TransformerEngineBaseModule):
    def __init__(
        self,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        rng_tracker_name=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        device="cpu",
    ):
        super().__init__()
        self._setup(
            in_features,
            out_features,
            sequence_parallel,
            fuse_wgrad_accumulation,
            tp_group,
            tp_size,
            bias,
            return_bias,
            parallel_mode,
        )
        self._add_weight(params_dtype, device, init_method, get_rng_state_tracker, rng_tracker_name)

    def _bias_in_gemm(self):
        return self.bias if self.apply_bias and self.parallel_mode != "row" else None

    def _finish(self, out):
        """A row-parallel bias is added after the reduction."""
        if self.apply_bias and self.parallel_mode == "row":
            out = out + self.bias
        return (out, self.bias) if self.return_bias else out

    def forward(self, inp, is_first_microbatch=None):
        return self._finish(_Linear.apply(inp, self.weight, self._bias_in_gemm(), self))


class LayerNormLinear(Linear):
    def __init__(
        self,
        in_features,
        out_features,
        eps=1e-5,
        normalization="LayerNorm",
        return_layernorm_output=False,
        return_layernorm_output_gathered=False,
        zero_centered_gamma=False,
        **linear,
    ):
        super().__init__(in_features, out_features, **linear)
        self.eps, self.normalization, self.zero_centered_gamma = eps, normalization, zero_centered_gamma
        self.return_layernorm_output = return_layernorm_output
        self.return_layernorm_output_gathered = return_layernorm_output_gathered
        self.layer_norm_weight, self.layer_norm_bias = _norm_parameters(
            self, in_features, linear["params_dtype"], self.sequence_parallel
        )

    def forward(self, inp, is_first_microbatch=None):
        out, normed = _LayerNormLinear.apply(
            inp, self.layer_norm_weight, self.layer_norm_bias, self.weight, self._bias_in_gemm(), self
        )
        out = self._finish(out)
        if not self.return_layernorm_output:
            return out
        return (*out, normed) if self.return_bias else (out, normed)


class GroupedLinear(TransformerEngineBaseModule):
    def __init__(
        self,
        num_gemms,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        rng_tracker_name=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        device="cpu",
        ub_name=None,
        single_grouped_weight=False,
    ):
        super().__init__()
        self._setup(
            in_features,
            out_features,
            sequence_parallel,
            fuse_wgrad_accumulation,
            tp_group,
            tp_size,
            bias,
            return_bias,
            parallel_mode,
        )
        self.num_gemms = num_gemms
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False}
        for i in range(num_gemms):
            self._add_weight(params_dtype, device, init_method, get_rng_state_tracker, rng_tracker_name, suffix=i)
        if single_grouped_weight:
            self.weight = torch.nn.Parameter(torch.stack(self._get_weight_tensors()))
            _mark(self.weight, 0)
            for i in range(num_gemms):
                self.register_parameter(f"weight{i}", None)

    def _get_weight_tensors(self) -> list[torch.Tensor]:
        """One per expert: parameters, or views of the single one."""
        single = getattr(self, "weight", None)
        return [getattr(self, f"weight{i}") for i in range(self.num_gemms)] if single is None else list(single)

    def init_fp8_metadata(self, num_gemms=1) -> None:
        pass

    def forward(self, inp, m_splits, is_first_microbatch=None):
        if len(m_splits) != self.num_gemms:
            raise ValueError(f"Number of splits ({len(m_splits)}) should match number of GEMMs ({self.num_gemms}).")
        weights = self._get_weight_tensors()
        biases = [getattr(self, f"bias{i}") for i in range(self.num_gemms)]
        out = _GroupedLinear.apply(inp, list(m_splits), self, *weights, *biases)
        return (out, biases) if self.return_bias else out


def _norm_parameters(module, size, dtype, sequence_parallel):
    weight = torch.nn.Parameter(torch.full((size,), 0.0 if module.zero_centered_gamma else 1.0, dtype=dtype))
    weight.sequence_parallel, bias = sequence_parallel, None
    if module.normalization == "LayerNorm":
        bias = torch.nn.Parameter(torch.zeros(size, dtype=dtype))
        bias.sequence_parallel = sequence_parallel
    return weight, bias


class _Norm(torch.nn.Module):
    def __init__(
        self,
        hidden_size,
        eps=1e-5,
        sequence_parallel=False,
        zero_centered_gamma=False,
        params_dtype=None,
        device="cpu",
    ):
        super().__init__()
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        self.weight, self.bias = _norm_parameters(self, hidden_size, params_dtype, sequence_parallel)

    def forward(self, x):
        return norm(x, self.weight, self.bias, self)


class RMSNorm(_Norm):
    normalization = "RMSNorm"


class LayerNorm(_Norm):
    normalization = "LayerNorm"


class DotProductAttention(torch.nn.Module):
    """A base class for Megatron's wrapper; the tests compute attention with Megatron's own DotProductAttention."""

    def __init__(self, *args, **kwargs):
        raise NotImplementedError("this stand-in has no attention")
