"""The adapter that lives on a linear: what it is, how it starts, and the mixin that runs it.

An adapted linear keeps its class's code, its parameters and their names; it gains ``lora_A`` and ``lora_B``, and its
class becomes a subclass with ``LoRALinear`` in front. Per rank (T tensor-parallel size, R rank, P stacked As):

    column   lora_A [P*R, I]    replicated          lora_B [rows/T, R]  sharded with the base's rows
    row      lora_A [P*R, I/T]  sharded on dim 1    lora_B [O, R]       replicated
    duplicated   lora_A [P*R, I], lora_B [rows, R], both replicated, like the base

A linear of experts has both with the rank's experts in front, [E, ...], sharded over expert-parallel ranks; T is then
the size of the expert-tensor-parallel group.

``rows`` are those of the adapted projections. They lie in the base's own order: over the whole linear if one block
covers it, else projection after projection. ``AdapterSpec.rows_of`` has them in Hugging Face order.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

from slime_plugins.lora.layers.lowrank import Collective, Dense, down, up
from slime_plugins.lora.layers.pieces import adapter_sharded_tensors
from slime_plugins.lora.layers.spec import AdapterSpec, base_weights, tp_group_of

# parallel mode, where the tokens are -> collective on h forward, on dh backward. See the table in ``lowrank``.
COLLECTIVES = {
    ("column", "whole"): ("none", "sum"),
    ("column", "sequence"): ("gather", "scatter"),
    ("column", "outside"): ("none", "sum_apart"),
    ("row", "whole"): ("sum", "none"),
    ("row", "sequence"): ("scatter", "gather"),
    ("row", "outside"): ("sum_apart", "none"),
}
# parallel mode -> the replicated parameters. Under sequence parallelism a rank's gradient of them covers its own
# tokens alone, and must be summed over tensor-parallel ranks.
REPLICATED = {"column": ("lora_A",), "row": ("lora_B",), "duplicated": ("lora_A", "lora_B")}


class LoRALinear:
    """Mixin in front of a Megatron linear class: y = base(x) + scaling * drop(x) A^T B^T.

    Attributes:
        lora: the AdapterSpec.
        lora_A, lora_B: the parameters, shapes as in the module's docstring.
        lora_enabled: False runs the base's own forward and nothing else.
    """

    lora: AdapterSpec
    lora_enabled: bool

    def forward(self, input_, *args, **kwargs):
        """Shapes and return form of the base's forward."""
        if not self.lora_enabled:
            return super().forward(input_, *args, **kwargs)
        input_, h, exchanges = self._lora_down(input_)
        output, bias = super().forward(input_, *args, **kwargs)
        return self._lora_up(output, h, exchanges), bias

    def _lora_down(self, x: torch.Tensor, seen_by_A: torch.Tensor | None = None, product=Dense):
        """First tap. ``seen_by_A``: what A multiplies where that is not the base's input."""
        kinds = ("none", "none")
        if self.lora_tp_size > 1:
            kinds = COLLECTIVES[self.lora.parallel, self.lora_tokens]
        if not torch.is_grad_enabled():  # then there is no weight gradient to sum for
            kinds = tuple(kind.replace("sum_apart", "none") for kind in kinds)
        exchanges = tuple(Collective(kind, self.lora_tp_group) for kind in kinds)
        if self.training and self.lora.config.dropout:
            seen_by_A = self._lora_dropout(x if seen_by_A is None else seen_by_A)
        x, h = down(x, seen_by_A, self.lora_A.to(x.dtype), exchanges, product)
        return x, h, exchanges

    def _lora_up(self, y: torch.Tensor, h: torch.Tensor, exchanges, product=Dense) -> torch.Tensor:
        return up(y, h, self.lora_B.to(y.dtype), self.lora.blocks, exchanges, product)

    def _lora_dropout(self, x: torch.Tensor) -> torch.Tensor:
        """Mask a sharded input from the model-parallel RNG and a replicated one from the common RNG.

        So shards get different masks, replicas the same one, and Megatron's recompute, which restores both, replays
        them (as Megatron does for its own dropouts).
        """
        sharded = self.lora.parallel == "row" or self.lora_sequence_parallel
        if sharded and self.lora_tp_group.size() > 1:
            with get_cuda_rng_tracker().fork():
                return torch.nn.functional.dropout(x, self.lora.config.dropout)
        return torch.nn.functional.dropout(x, self.lora.config.dropout)

    @property
    def lora_tp_group(self):
        return tp_group_of(self)

    @property
    def lora_tp_size(self) -> int:
        """Number of shards of the base weight."""
        return 1 if self.lora.parallel == "duplicated" else self.lora_tp_group.size()

    @property
    def lora_tokens(self) -> str:
        """Which tokens the base takes and gives, and who exchanges them: a key of ``COLLECTIVES``.

        whole: all of the tensor-parallel group's, the base sums. sequence: this rank's, the base gathers and scatters.
        outside: all of them, and partial sums are the caller's business.
        """
        if self.lora.parallel != "duplicated" and _leaves_exchange_to_caller(self):
            return "outside"
        return "sequence" if self.config.sequence_parallel and self.lora_tp_group.size() > 1 else "whole"

    @property
    def lora_sequence_parallel(self) -> bool:
        return self.lora_tokens == "sequence"

    def lora_installed(self) -> None:
        """Called once, when the adapter is there."""

    def lora_full_numel(self) -> int:
        """Adapter parameters over all tensor- and expert-parallel ranks, each replica counted once."""
        A, B = self.lora_A.numel(), self.lora_B.numel()
        of_ranks = A * (self.lora_tp_size if self.lora.parallel == "row" else 1)
        of_ranks += B * (self.lora_tp_size if self.lora.parallel == "column" else 1)
        return of_ranks * self.lora.num_experts // len(self.lora.experts or [None])

    def lora_linears(self) -> list[LoRALinear]:
        """One linear per base weight: this one; for stacked experts, a view of each."""
        return [self]

    def lora_delta_weight(self) -> torch.Tensor:
        """scaling * B A for this rank's shard of the base weight, float32 [O, I], no communication."""
        spec = self.lora
        A, B = self.lora_A.detach().float(), self.lora_B.detach().float()
        delta = A.new_zeros(self.weight.shape)
        for block in spec.blocks:
            delta[block.out.run_index().to(delta.device)] = block.scaling * (B[block.rows] @ A[block.cols])
        return delta

    def _apply(self, fn, recurse=True):
        """Let ``.to``, ``.cuda``, ``.bfloat16`` move the adapter but not change the dtype that was asked for.

        Megatron's Float16Module casts the whole model after the provider has returned.
        """
        if not self.lora_keep_dtype:
            return super()._apply(fn, recurse)
        adapter = {name: self._parameters.pop(name) for name in ("lora_A", "lora_B")}
        super()._apply(fn, recurse)
        for name, parameter in adapter.items():
            parameter.data = parameter.data.to(fn(parameter.data).device)
            self._parameters[name] = parameter
        return self

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """The base's own entries and the adapter's, which the base would take for replicated tensors."""
        if "lora_A" not in self._parameters:  # inside hide_adapters
            return super().sharded_state_dict(prefix, sharded_offsets, metadata)
        with hide_adapters(self):
            state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state.update(adapter_sharded_tensors(self, prefix, sharded_offsets))
        return state


def _leaves_exchange_to_caller(linear) -> bool:
    """Megatron's own linears say so; TE's lose their parallel mode."""
    if hasattr(linear, "explicit_expert_comm"):
        return linear.explicit_expert_comm
    return hasattr(linear, "parallel_mode") and linear.parallel_mode is None


def adapt(linear: torch.nn.Module, lora_class: type, spec: AdapterSpec, dtype: torch.dtype | None) -> None:
    """Turn a linear into its LoRA form in place. B starts at zero: the output does not change.

    Args:
        lora_class: subclass of ``type(linear)`` with ``LoRALinear`` in front.
        dtype: of lora_A and lora_B; None takes the base weight's.
    """
    linear.__class__ = lora_class
    linear.lora, linear.lora_enabled, linear.lora_keep_dtype = spec, True, dtype is not None
    weight = base_weights(linear)[0]
    dtype, stack = dtype or weight.dtype, (len(spec.experts),) if spec.experts else ()
    linear.lora_A = torch.nn.Parameter(_init_A(linear).to(device=weight.device, dtype=dtype))
    linear.lora_B = torch.nn.Parameter(torch.zeros(*stack, spec.rows, spec.rank, device=weight.device, dtype=dtype))
    _mark(linear.lora_A, sharded_dim=-1 if spec.parallel == "row" else None)
    _mark(linear.lora_B, sharded_dim=-2 if spec.parallel == "column" else None)
    for name in REPLICATED[spec.parallel]:
        parameter = getattr(linear, name)
        if spec.experts:
            _mark_expert_replica(parameter, linear.lora_tp_group)
        else:
            # Megatron's finalize_model_grads sums marked gradients over TP, once.
            parameter.sequence_parallel = linear.lora_sequence_parallel
    if spec.experts:
        # Reduced over the expert-data-parallel group, in buffers and an optimizer of their own.
        linear.lora_A.allreduce = linear.lora_B.allreduce = _expert_groups_are_dense(linear)
    linear.lora_installed()


def _mark(parameter: torch.nn.Parameter, sharded_dim: int | None) -> None:
    """Tell Megatron's grad norm, clipping and optimizer whether TP ranks hold shards or copies."""
    sharded = sharded_dim is not None
    dim = parameter.dim() + sharded_dim if sharded else -1
    set_tensor_model_parallel_attributes(parameter, is_parallel=sharded, dim=dim, stride=1)
    parameter.allreduce = True  # reduced over the dense data-parallel group


def _mark_expert_replica(parameter: torch.nn.Parameter, etp_group) -> None:
    """Count a copy once in the grad norm. Megatron asks the dense TP rank, which says nothing about copies of experts;
    a parameter marked as shared it leaves out."""
    parameter.tensor_model_parallel = True
    parameter.shared = etp_group.rank() > 0


def _expert_groups_are_dense(linear) -> bool:
    """Are the ranks that hold equal experts those that hold equal dense weights?"""
    dense_tp_size = parallel_state.get_tensor_model_parallel_world_size()
    return linear.lora.num_experts == len(linear.lora.experts) and linear.lora_tp_group.size() == dense_tp_size


def _init_A(linear) -> torch.Tensor:
    """This rank's shard of the full A, float32 [P*R, I or I/T] (stacked [E, ...]).

    The full A depends on seed and name alone: every expert, at every parallelism, starts from the same A of its own.
    """
    spec: AdapterSpec = linear.lora
    local = base_weights(linear)[0].shape[1]
    columns = slice(None)
    if spec.parallel == "row":
        tp_rank = linear.lora_tp_group.rank()
        columns = slice(tp_rank * local, (tp_rank + 1) * local)
    full = local * linear.lora_tp_size if spec.parallel == "row" else local
    if spec.experts is None:
        return _full_A(spec, full)[:, columns]
    return torch.stack([_full_A(spec.of_expert(i), full)[:, columns] for i in range(len(spec.experts))])


def _full_A(spec: AdapterSpec, fan_in: int) -> torch.Tensor:
    stacked = []
    for i in range(spec.num_A):
        rank = spec.ranks[i] if spec.split else spec.rank
        key = f"{spec.config.seed}:{spec.name}:{spec.parts[i].name if spec.split else 'fused'}"
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little", signed=True)
        generator = torch.Generator().manual_seed(seed)
        A = torch.zeros(spec.rank, fan_in)
        if spec.config.init == "kaiming":  # kaiming_uniform_(a=sqrt(5)) of a [rank, in] matrix, as PEFT has it
            A[:rank].uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=generator)
        else:
            A[:rank].normal_(0.0, 1 / spec.rank, generator=generator)
        stacked.append(A)
    return torch.cat(stacked)


@contextlib.contextmanager
def hide_adapters(module: torch.nn.Module) -> Iterator[None]:
    """Inside, ``named_parameters``, ``state_dict`` and ``sharded_state_dict`` show the base alone.

    For loaders and savers of the base, which know no adapter names. Forward does not work inside.
    """
    hidden = []
    for linear in module.modules():
        if isinstance(linear, LoRALinear) and "lora_A" in linear._parameters:
            hidden.append((linear, {name: linear._parameters.pop(name) for name in ("lora_A", "lora_B")}))
    try:
        yield
    finally:
        for linear, parameters in hidden:
            linear._parameters.update(parameters)
