"""``--lora-sync merged``: W + scaling B A in place of W, tensor by tensor, while slime streams its weights.

slime gathers tensors for its rollout engines in two places: one by one (``all_gather_param``, the distributed
transport) and in buckets (``_get_megatron_full_params``, the colocated and disk transports). While weights are being
sent, an adapted weight is replaced there by a merged one, built from this rank's shards on the spot. The live weights
are read only, and no more than one bucket is merged at a time.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from slime_plugins.lora.adapters import has_adapters, iter_merging, state_of
from slime_plugins.lora.layers import Carrier, LoRALinear, TokenRows
from slime_plugins.lora.names import is_adapter
from slime_plugins.lora.projections import Rounding
from slime_plugins.lora.projections import merge as merge_dense
from slime_plugins.lora.quant.packed import PackedWeight, dense_of, noted
from slime_plugins.lora.slime.hooks import quantised_sync
from slime_plugins.lora.slime.hooks.engine_scheme import scheme_of

logger = logging.getLogger(__name__)


class Values(Protocol):
    """Where the actor's adapter values are while the trainer's memory is offloaded: ``policies.Policies``."""

    def adapter_values(self, carrier: Carrier) -> contextlib.AbstractContextManager: ...

    def forget_values(self) -> None: ...


Adapted = dict[int, tuple[LoRALinear | TokenRows, int]]
"""``id`` of an adapted base parameter -> its linear, and its index in ``FrozenLinear.parameters``."""


def adapted_parameters(model) -> Adapted:
    """Every adapted base parameter of a model."""
    return {
        id(parameter): (linear, index)
        for linear in iter_merging(model)
        for index, parameter in enumerate(linear.lora_base.parameters)
    }


@dataclass
class Sync:
    """One weight sync: what is sent merged, and what it came to on this rank."""

    policies: Values | None
    linears: Adapted
    bytes: float = 0.0
    """This rank's share, among its pipeline group's, of what one engine receives."""
    seconds: float = 0.0
    rounding: Rounding = field(default_factory=Rounding)
    """Of this rank's shards: what the merged update is, and what rounding has put back to the base's value."""
    read_bytes: float = 0.0
    """Of weights that this rank alone has read for the engine, outside of buckets that all gather: its own experts."""
    merged: set[int] = field(default_factory=set)
    """``id`` of every base weight that has been merged; all of them, in a sync that has gone well."""
    updater: Any = None
    """slime's: its arguments, model name and quantisation make of a weight what engines get. None: not for engines."""
    loss: quantised_sync.Loss | None = None
    """Of a quantised copy in the engines, of this pipeline stage: what is left of the update."""

    def __post_init__(self) -> None:
        scheme = scheme_of(getattr(self.updater, "quantization_config", None))
        if scheme is not None:
            self.loss = quantised_sync.Loss(scheme)


_current: Sync | None = None
"""The sync under way in this process. slime's gathering functions know neither model nor actor."""


def syncing(update_weights):
    """Hook: the actor's ``update_weights``. Inside, adapted weights are sent merged; then the cost is noted."""

    @functools.wraps(update_weights)
    def hooked(self):
        if not has_adapters(getattr(self, "model", None)):
            return update_weights(self)
        with sending(self.model, self.weights_backuper, getattr(self, "weight_updater", None)) as sync:
            result = update_weights(self)
        # No collective here: with --offload-train slime has taken the process groups down by now.
        if sync.bytes or sync.read_bytes:  # slime skips the sync where there is no engine
            state_of(self.model).last_sync = sync
        announce = getattr(getattr(self, "weight_updater", None), "announce", None)
        if announce is not None:
            announce(self)
        return result

    return hooked


def is_sending() -> bool:
    """Is a weight sync under way in this process?"""
    return _current is not None


def count_bytes(number: float) -> None:
    """Add to what the sync under way has sent, if there is one."""
    if _current is not None:
        _current.bytes += number


@contextlib.contextmanager
def sending(model, policies: Values | None = None, updater: Any = None) -> Iterator[Sync]:
    """Inside, slime's gathering functions return merged weights for adapted linears.

    Args:
        updater: slime's weight updater, where it is engines that they are gathered for.
    """
    global _current
    before, start = _current, time.perf_counter()
    _current = Sync(policies, adapted_parameters(model), updater=updater)
    try:
        yield _current
    finally:
        sync, _current = _current, before
        if policies is not None:
            policies.forget_values()
        sync.seconds = time.perf_counter() - start


def base_parameters(named_params_and_buffers):
    """Hook: slime's walk over a model's weights, by which it loads, converts and sends. Adapters are not in it."""

    @functools.wraps(named_params_and_buffers)
    def hooked(*args, **kwargs):
        for name, tensor in named_params_and_buffers(*args, **kwargs):
            if not is_adapter(name):
                yield name, tensor

    return hooked


def merging_one(all_gather_param):
    """Hook: the gathering of one parameter."""

    @functools.wraps(all_gather_param)
    def hooked(name: str, param: torch.nn.Parameter):
        if _current is None:
            return all_gather_param(name, param)
        _measure_loss(_current)
        if id(param) in _current.linears:
            merged = torch.nn.Parameter(merge(*_current.linears[id(param)], param), requires_grad=False)
            merged.__dict__.update(noted(param))  # tensor_model_parallel, partition_dim, parallel_mode
            param = merged
        elif isinstance(param, PackedWeight):  # an unadapted linear of a 4-bit base
            dense = torch.nn.Parameter(dense_of(param), requires_grad=False)
            dense.__dict__.update(noted(param))
            param = dense
        full = all_gather_param(name, param)
        from megatron.core import mpu

        # slime goes on to gather experts over expert-parallel ranks.
        ranks = mpu.get_expert_model_parallel_world_size() if ".experts." in name else 1
        _current.bytes += full.numel() * full.element_size() * ranks
        return full

    return hooked


def merging_bucket(get_full_params):
    """Hook: the gathering of a bucket from a mapping of names to this rank's tensors."""

    @functools.wraps(get_full_params)
    def hooked(infos, weights, *args, **kwargs):
        if _current is None:
            return get_full_params(infos, weights, *args, **kwargs)
        if not isinstance(weights, MergedWeights):
            weights = MergedWeights.of(weights, _current.policies)
        _measure_loss(_current, weights.stored)
        read = _current.read_bytes
        full = get_full_params(infos, weights, *args, **kwargs)
        _current.read_bytes = read
        from megatron.core import mpu

        # Every pipeline stage ends up with the whole bucket; its share is what makes the stages' sum the total.
        stages = mpu.get_pipeline_model_parallel_world_size()
        _current.bytes += sum(tensor.numel() * tensor.element_size() for tensor in full) / stages
        return full

    return hooked


class MergedWeights(Mapping):
    """Global names -> tensors, adapted ones merged when they are asked for. Holds references, no weights."""

    def __init__(self, args, model, policies: Values | None) -> None:
        from slime.backends.megatron_utils.update_weight.common import named_params_and_buffers

        self._live: Mapping[str, torch.Tensor] = dict(
            named_params_and_buffers(args, model, convert_to_global_name=True)
        )
        self._policies = policies
        self._linears = adapted_parameters(model)
        self._offloaded = getattr(args, "offload_train", False)

    @classmethod
    def of(cls, live: Mapping[str, torch.Tensor], policies: Values | None) -> MergedWeights:
        """The same for a mapping of live parameters, inside ``sending``."""
        made = cls.__new__(cls)
        made._live, made._policies = live, policies
        made._linears, made._offloaded = _current.linears if _current is not None else {}, False
        return made

    def __getitem__(self, name: str) -> torch.Tensor:
        parameter = self._live[name]
        tensor = self.stored(parameter)
        adapted = self._linears.get(id(parameter))
        if _current is not None:
            _current.read_bytes += tensor.numel() * tensor.element_size()
        return dense_of(tensor) if adapted is None else merge(*adapted, tensor, self._policies)

    def stored(self, parameter: torch.Tensor) -> torch.Tensor:
        """Where a live parameter's values are."""
        return _offloaded_copy(parameter) if self._offloaded else parameter

    def __iter__(self) -> Iterator[str]:
        return iter(self._live)

    def __len__(self) -> int:
        return len(self._live)


@torch.no_grad()
def merge(
    linear: LoRALinear | TokenRows, index: int, base: torch.Tensor, values: Values | None = None
) -> torch.Tensor:
    """W + scaling B A of this rank's shard: added in float32, rounded once, in new memory on the current device.

    Args:
        index: of the base parameter, in ``FrozenLinear.parameters``.
        base: that parameter, live or a copy in host memory.
        values: where the adapter's values are while the trainer is offloaded; the current sync's by default.
    """
    with _at_hand(linear, base, values or (_current.policies if _current else None)) as stored:
        merged = linear.lora_merged(index, stored, _current.rounding if _current else None)
    if _current is not None:
        _current.merged.add(id(linear.lora_base.parameters[index]))
    return merged


@contextlib.contextmanager
def _at_hand(linear: LoRALinear | TokenRows, base: torch.Tensor, values: Values | None) -> Iterator[torch.Tensor]:
    """A base parameter on the current device; inside, the adapter's values are there too."""
    device = torch.cuda.current_device() if torch.cuda.is_available() else base.device
    with values.adapter_values(linear) if values else contextlib.nullcontext():
        yield base.detach().to(device)


@torch.no_grad()
def _measure_loss(sync: Sync, stored: Callable[[torch.Tensor], torch.Tensor] = lambda parameter: parameter) -> None:
    """Once per sync: what slime's quantiser leaves of the update, on the sample of this pipeline stage.

    Where slime gathers first: then its process groups are there, as they need not be before and after a sync, and all
    ranks that share a weight come by. Gathers over tensor-parallel groups alone, whichever the transport.
    """
    global _current
    loss = sync.loss
    if loss is None or loss.taken:
        return
    loss.taken = True
    from slime.backends.megatron_utils.megatron_to_hf import convert_to_hf
    from slime.backends.megatron_utils.update_weight.common import all_gather_param, named_params_and_buffers

    updater, _current = sync.updater, None  # these gathers belong to no sync
    try:
        named = named_params_and_buffers(updater.args, updater.model)
        adapted = ((name, p) for name, p in named if isinstance(sync.linears.get(id(p), (None,))[0], LoRALinear))
        for name, parameter in quantised_sync.sample(adapted):
            linear, index = sync.linears[id(parameter)]
            assert isinstance(linear, LoRALinear)  # for type checkers
            with _at_hand(linear, stored(parameter), sync.policies) as base:
                weight, update = linear.lora_base.dense(index, base), linear.lora_update(index)
            quantised_sync.compare(
                loss,
                functools.partial(convert_to_hf, updater.args, updater.model_name, name),
                updater.quantization_config,
                functools.partial(_whole, all_gather_param, name, parameter, weight, update),
            )
    except ValueError as error:
        logger.warning("LoRA: train/lora/sync_lost is not measured after the engines' quantisation: %s", error)
    finally:
        _current = sync


def _whole(all_gather_param, name: str, like: torch.Tensor, weight: torch.Tensor, update: torch.Tensor, which: int):
    """W (0), W + D (1) or D (2) of a weight, gathered as slime does, in the base's dtype."""
    shard = weight if which == 0 else merge_dense(weight, update) if which == 1 else update.to(weight.dtype)
    parameter = torch.nn.Parameter(shard, requires_grad=False)
    parameter.__dict__.update(noted(like))
    return all_gather_param(name, parameter)


def _offloaded_copy(parameter: torch.Tensor) -> torch.Tensor:
    """What slime's memory saver keeps of a weight in host memory while it is paused; the weight itself otherwise."""
    from torch_memory_saver import torch_memory_saver

    if isinstance(parameter, PackedWeight):
        return PackedWeight(parameter.packed.map(_offloaded_copy), parameter.dtype)
    copy = torch_memory_saver.get_cpu_backup(parameter, zero_copy=True)
    return parameter if copy is None else copy
