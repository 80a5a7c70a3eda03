"""What holds adapter parameters: how they go in, hide, move, lie in checkpoints, are counted. All read the table."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

from slime_plugins.lora.layers.pieces import Piece, Placement, adapter_sharded_tensors
from slime_plugins.lora.parameters import AdapterParameter


class Carrier(torch.nn.Module):
    """Mixin in front of the class of a module that carries adapter parameters: a linear (``adapter.LoRALinear``).

    Attributes:
        lora_table: its parameters; the tensors are attributes of those names.
        lora_enabled: False runs the base's own forward and nothing else.
        lora_keep_dtype: ``.to`` and ``.bfloat16`` move the parameters but do not cast them.
        lora_group: the (expert-)tensor-parallel group over which sharded parameters are cut.
        lora_experts: experts stacked in front of every parameter, as numbers in the whole layer, of
            ``lora_num_experts``; None without.
    """

    lora_table: tuple[AdapterParameter, ...]
    lora_enabled: bool
    lora_keep_dtype: bool
    lora_group: Any
    lora_experts: range | None
    lora_num_experts: int

    def lora_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Name -> parameter, in the table's order; {} inside ``hide_adapters``."""
        found = ((entry.name, self._parameters.get(entry.name)) for entry in self.lora_table)
        return {name: parameter for name, parameter in found if parameter is not None}

    def lora_pieces(self) -> dict[str, tuple[Piece, ...]]:
        """Parameter name -> its pieces."""
        raise NotImplementedError

    def lora_placement(self) -> Placement:
        """This rank's place for the parameters of this carrier."""
        dense = all(getattr(parameter, "allreduce", True) for parameter in self.lora_parameters().values())
        if dense:
            replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        else:
            replica = parallel_state.get_expert_data_parallel_rank()
        return Placement(self.lora_group.rank(), self.lora_group.size(), replica, self.lora_group)

    def lora_full_numel(self) -> int:
        """Adapter parameters over all tensor- and expert-parallel ranks, each replica counted once."""
        return self.lora_num_experts * sum(entry.full_numel(self.lora_group.size()) for entry in self.lora_table)

    def lora_bytes(self) -> int:
        """Their bytes."""
        size, parameters = self.lora_group.size(), self.lora_parameters()
        sizes = (entry.full_numel(size) * parameters[entry.name].element_size() for entry in self.lora_table)
        return self.lora_num_experts * sum(sizes)

    def _apply(self, fn: Callable, recurse: bool = True):
        """Let ``.to``, ``.cuda``, ``.bfloat16`` move the adapter but not change the dtype that was asked for.

        Megatron's Float16Module casts the whole model after the provider has returned.
        """
        if not self.lora_keep_dtype:
            return super()._apply(fn, recurse)
        with _popped(self) as parameters:
            super()._apply(fn, recurse)
            for parameter in parameters.values():
                parameter.data = parameter.data.to(fn(parameter.data).device)
        return self

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        """The base's own entries and the adapter's, which the base would take for replicated tensors."""
        hidden = not self.lora_parameters()
        with _popped(self):
            state = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        return state if hidden else state | adapter_sharded_tensors(self, prefix, sharded_offsets)


def install(
    carrier: Carrier, initial: Mapping[str, torch.Tensor], *, partial_gradients: bool, expert_buffers: bool
) -> None:
    """Register the table's parameters and tell Megatron what they are.

    Args:
        initial: name -> value, on the base's device, in the adapter's dtype.
        partial_gradients: a rank's gradient of a replicated parameter covers its own tokens alone (sequence
            parallelism), and Megatron's ``finalize_model_grads`` has to sum it over tensor-parallel ranks, once.
        expert_buffers: gradients are reduced over the expert-data-parallel group, in buffers and an optimizer of their
            own.
    """
    for entry in carrier.lora_table:
        parameter = torch.nn.Parameter(initial[entry.name])
        carrier.register_parameter(entry.name, parameter)
        sharded = entry.sharded_dim is not None
        dim = parameter.dim() - len(entry.shape) + entry.sharded_dim if entry.sharded_dim is not None else -1
        # For the grad norm, clipping and the optimizer: do TP ranks hold shards or copies?
        set_tensor_model_parallel_attributes(parameter, is_parallel=sharded, dim=dim, stride=1)
        parameter.allreduce = not expert_buffers  # type: ignore[attr-defined]
        if not sharded and carrier.lora_experts is not None:
            _mark_expert_replica(parameter, carrier.lora_group)
        elif not sharded:
            parameter.sequence_parallel = partial_gradients  # type: ignore[attr-defined]


def _mark_expert_replica(parameter: Any, etp_group: Any) -> None:
    """Count a copy once in the grad norm. Megatron asks the dense TP rank, which says nothing about copies of experts;
    a parameter marked as shared it leaves out."""
    parameter.tensor_model_parallel = True
    parameter.shared = etp_group.rank() > 0


def iter_carriers(model: torch.nn.Module) -> Iterator[Carrier]:
    """Every carrier in a module, in model order."""
    return (module for module in model.modules() if isinstance(module, Carrier))


@contextlib.contextmanager
def hide_adapters(module: torch.nn.Module) -> Iterator[None]:
    """Inside, ``named_parameters``, ``state_dict`` and ``sharded_state_dict`` show the base alone.

    For loaders and savers of the base, which know no adapter names. Forward does not work inside.
    """
    with contextlib.ExitStack() as hidden:
        for carrier in iter_carriers(module):
            hidden.enter_context(_popped(carrier))
        yield


@contextlib.contextmanager
def _popped(carrier: Carrier) -> Iterator[dict[str, torch.nn.Parameter]]:
    """Inside, the module has no adapter parameters; yields them."""
    parameters = carrier.lora_parameters()
    for name in parameters:
        del carrier._parameters[name]
    try:
        yield parameters
    finally:
        carrier._parameters.update(parameters)
