"""State of Megatron's optimizers by adapter parameter: float32 master and moments, whole, whatever the sharding.

Handled: DistributedOptimizer (each data-parallel rank owns flat ranges of the parameters), the plain bf16/fp16 and
fp32 optimizers, and chains of these, over torch.optim, Apex or TransformerEngine optimizers. Offloaded and
precision-aware optimizers are refused: they save memory that an adapter's state does not take.

Megatron's own ``sharded_state_dict`` is not used: it knows Adam alone, fails before the first step, and writes into
the optimizer before anything has been checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from slime_plugins.lora.control import rates
from slime_plugins.lora.parallel import all_gather

MASTER = "param"
"""The float32 copy of a 16-bit parameter, under Megatron's name for it."""
_SCALARS = ("step",)
RATIO = rates.RATIO
"""LoRA+'s ratio among the scalars of a checkpoint; absent without LoRA+."""


def stored_states(names: Sequence[str], dtype: torch.dtype) -> list[str]:
    """State names of a parameter of ``dtype`` in a checkpoint's order: a float32 one is its own master."""
    return [name for name in names if name != MASTER or dtype != torch.float32]


class OptimizerState:
    """The optimizer of this rank, read and written by model parameter.

    Raises:
        ValueError: an optimizer of a kind that is not known.
    """

    def __init__(self, optimizer):
        self.inner = [o for o in _unchained(optimizer) if not getattr(o, "is_stub_optimizer", False)]
        for inner in self.inner:
            _refuse_unknown(inner)

    def parameters(self) -> set[torch.nn.Parameter]:
        """Every model parameter that it trains on this rank, or of which another rank owns a part."""
        return {parameter for inner in self.inner for parameter in _parameters(inner)}

    def check_trains(self, adapters: set[torch.nn.Parameter]) -> None:
        """Raise ValueError unless it trains these parameters of this rank and no others."""
        known = self.parameters()
        if adapters - known:
            raise ValueError(
                f"the optimizer does not train {len(adapters - known)} of {len(adapters)} adapter parameters: "
                "it was made for another model, or before apply_lora"
            )
        if known - adapters:
            raise ValueError(f"the optimizer trains {len(known - adapters)} parameters that belong to no adapter")

    def gather(self) -> tuple[dict[torch.nn.Parameter, dict[str, torch.Tensor]], dict[str, Any], list[str]]:
        """For every parameter, state name -> tensor of its shape; the scalars; all state names, equal on every rank.

        Masters of float32 parameters are left out: they are the parameters.

        Collectives:
            one all_reduce per state name over each data-parallel group, some all_gather_object.
        Raises:
            ValueError: parameters disagree about a scalar.
        """
        scalars: dict[str, set] = {}
        for inner in self.inner:
            for state in inner.optimizer.state.values():
                _note_scalars(state, scalars)
            for group in inner.optimizer.param_groups:
                _note_scalars(group, scalars)
        for other in all_gather(scalars):
            for name, values in other.items():
                scalars.setdefault(name, set()).update(values)
        uneven = {name: sorted(values) for name, values in scalars.items() if len(values) > 1}
        if uneven:
            raise ValueError(f"parameters of one optimizer have different {uneven}; expected one value for all")
        tensors: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {}
        for inner in self.inner:
            tensors.update(_gather_distributed(inner) if _is_distributed(inner) else _copies(inner))
        one_each: dict[str, Any] = {name: next(iter(values)) for name, values in scalars.items() if values}
        if self.lora_plus_ratio != 1:
            one_each[RATIO] = self.lora_plus_ratio
        scalers = [s.state_dict() for s in (getattr(inner, "grad_scaler", None) for inner in self.inner) if s]
        names = all_gather({name for found in tensors.values() for name in found})
        return tensors, one_each | ({"grad_scaler": scalers[0]} if scalers else {}), sorted(set().union(*names))

    @property
    def lora_plus_ratio(self) -> float:
        """Of B's learning rate to A's; 1 without LoRA+."""
        return max((rates.ratio_of(inner) for inner in self.inner), default=1.0)

    def restart(self) -> None:
        """Forget the moments and start the masters from the model's parameters."""
        for inner in self.inner:
            inner.reload_model_params()
            for state in inner.optimizer.state.values():
                for value in state.values():
                    if isinstance(value, torch.Tensor):
                        value.zero_()
            for group in inner.optimizer.param_groups:
                if "step" in group:
                    group["step"] = 0

    def restore(
        self,
        states: Sequence[str],
        scalars: Mapping[str, Any],
        tensor_of: Callable[[torch.nn.Parameter, str], torch.Tensor],
    ) -> None:
        """Write masters and moments. ``tensor_of`` gives a CPU tensor of the parameter's shape; MASTER always."""
        names = {MASTER, *states}
        for inner in self.inner:
            for parameter, main, part in _owned(inner):
                _set(inner, main, {name: part(tensor_of(parameter, name)) for name in names})
            if "step" in scalars:
                _set_step(inner, scalars["step"])
            if scalars.get("grad_scaler") and getattr(inner, "grad_scaler", None):
                inner.grad_scaler.load_state_dict(scalars["grad_scaler"])


def _unchained(optimizer) -> list:
    if optimizer is None:
        return []
    if hasattr(optimizer, "chained_optimizers"):
        return [inner for o in optimizer.chained_optimizers for inner in _unchained(o)]
    return [optimizer]


def _is_distributed(inner) -> bool:
    return hasattr(inner, "gbuf_ranges")


def _refuse_unknown(inner) -> None:
    if hasattr(getattr(inner, "optimizer", None), "sub_optimizers"):
        flag = "--optimizer-cpu-offload"
    elif getattr(getattr(inner, "config", None), "use_precision_aware_optimizer", False):
        flag = "--use-precision-aware-optimizer"
    elif hasattr(inner, "optimizer"):
        return
    else:
        raise ValueError(f"an optimizer of class {type(inner).__name__} cannot be saved with an adapter")
    raise ValueError(f"{flag} cannot be saved with an adapter; leave it out, an adapter's optimizer state is small")


def _parameters(inner) -> Iterator[torch.nn.Parameter]:
    if _is_distributed(inner):
        for buffer in inner.buffers:
            yield from buffer.param_index_map
    else:
        for parameter, _, _ in _owned(inner):
            yield parameter


def _owned(inner) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor, Callable]]:
    """Model parameter, the tensor that is optimised for it here, and what cuts that one's part out of a whole tensor.

    The tensor that is optimised is float32: the parameter's master, or a flat range of it.
    """
    if _is_distributed(inner):
        for parameter, start, end in _ranges(inner):
            group, order = inner.model_param_group_index_map[parameter]
            main = inner.optimizer.param_groups[group]["params"][order]
            yield parameter, main, lambda t, start=start, end=end: t.reshape(-1)[start:end]
        return
    masters = {}
    for models, mains in zip(getattr(inner, "float16_groups", ()), getattr(inner, "fp32_from_float16_groups", ())):
        masters.update({id(main): model for model, main in zip(models, mains)})
    for group in inner.optimizer.param_groups:
        for main in group["params"]:
            yield masters.get(id(main), main), main, lambda t: t


def _ranges(inner) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """Parameters of which this data-parallel rank owns the elements [start, end)."""
    for buffers in inner.gbuf_ranges:
        for buckets in buffers.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def _tensors(inner, parameter: torch.nn.Parameter, main: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {MASTER: main, **inner.optimizer.state.get(main, {})}
    return {
        name: value.detach()
        for name, value in found.items()
        if isinstance(value, torch.Tensor)
        and name not in _SCALARS
        and not (name == MASTER and parameter.dtype == torch.float32)
    }


def _copies(inner) -> dict[torch.nn.Parameter, dict[str, torch.Tensor]]:
    return {parameter: _tensors(inner, parameter, main) for parameter, main, _ in _owned(inner)}


def _gather_distributed(inner) -> dict[torch.nn.Parameter, dict[str, torch.Tensor]]:
    """Every owner writes its ranges into a zeroed flat buffer; the sum over data-parallel ranks is the whole state."""
    parameters = list(_parameters(inner))
    offsets, total = {}, 0
    for parameter in parameters:
        offsets[parameter] = total
        total += parameter.numel()
    group = inner.data_parallel_group
    flats: dict[str, torch.Tensor] = {}
    owned = list(_owned(inner))
    names = sorted({name for p, main, _ in owned for name in _tensors(inner, p, main)})
    everyones: list[Any] = [None] * group.size()
    dist.all_gather_object(everyones, names, group=group)
    device = parameters[0].device if parameters else "cpu"
    for name in sorted({name for names in everyones for name in names}):
        flats[name] = torch.zeros(total, dtype=torch.float32, device=device)
    for (parameter, main, _), (_, start, end) in zip(owned, _ranges(inner)):
        for name, value in _tensors(inner, parameter, main).items():
            flats[name][offsets[parameter] + start : offsets[parameter] + end] = value.reshape(-1)
    for flat in flats.values():
        # As integers: every element has one owner, and adding 0.0 would turn its -0.0 into 0.0.
        dist.all_reduce(flat.view(torch.int32), group=group)
    return {
        parameter: {
            name: flat[offsets[parameter] : offsets[parameter] + parameter.numel()].view(parameter.shape)
            for name, flat in flats.items()
            if not (name == MASTER and parameter.dtype == torch.float32)
        }
        for parameter in parameters
    }


def _note_scalars(state: Mapping[str, Any], scalars: dict[str, set]) -> None:
    for name in _SCALARS:
        if name in state:
            value = state[name]
            scalars.setdefault(name, set()).add(value.item() if isinstance(value, torch.Tensor) else value)


@torch.no_grad()
def _set(inner, main: torch.Tensor, values: Mapping[str, torch.Tensor]) -> None:
    state = inner.optimizer.state[main]
    for name, value in values.items():
        if name == MASTER:
            main.copy_(value)
        elif isinstance(state.get(name), torch.Tensor):
            state[name].copy_(value)
        else:
            state[name] = torch.empty_like(main).copy_(value)


def _set_step(inner, step: float) -> None:
    """torch counts per parameter, Apex and TransformerEngine per group."""
    if type(inner.optimizer).__module__.startswith("torch.optim"):
        for group in inner.optimizer.param_groups:
            for main in group["params"]:
                if inner.optimizer.state.get(main):  # no state: the optimizer has none, or no step was made
                    inner.optimizer.state[main]["step"] = torch.tensor(float(step))
    else:
        for group in inner.optimizer.param_groups:
            group["step"] = int(step)
