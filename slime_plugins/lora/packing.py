"""Build a model in 4 bits and load into it: the dense model is never there.

For a trainer that loads shard by shard into the model that it has built:

    with packing():                    each linear's weight becomes unset codes as it is registered
        model = build()
    keep_packed(model, quant)          what lies outside the decoder, or is excluded, is dense again
    ... load ...                       ``copy_`` into a weight quantises it
    finish_packing(model, quant)       scales nested over tensor-parallel ranks, linears ready to run
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from slime_plugins.lora.base.quantization import BLOCK, BaseQuant
from slime_plugins.lora.layers import kind_of
from slime_plugins.lora.parallel import chunks_of, everywhere
from slime_plugins.lora.quant.packed import Packed, PackedWeight, noted
from slime_plugins.lora.quantize import Plan, QuantReport, codes_in, compress, matrices_of, planned


@contextlib.contextmanager
def packing() -> Iterator[None]:
    """Inside, a model is built with unset codes in place of its linears' weights, each replaced as it is registered.

    For a trainer that loads into the model that it has built: ``keep_packed``, load (``copy_`` quantises),
    ``finish_packing``. So the dense model is never there, and at most one dense weight at a time.
    """
    hook: Any = _registered  # typed as if it could not give another parameter
    handle = torch.nn.modules.module.register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _registered(module: torch.nn.Module, name: str, parameter: Any) -> torch.nn.Parameter | None:
    kind = kind_of(module)
    if kind is None or not kind.frozen.can_be_packed or isinstance(parameter, PackedWeight):
        return None
    if parameter is None or not name.startswith("weight") or parameter.dim() != 2 or parameter.shape[1] % BLOCK:
        return None
    unset = PackedWeight(Packed.unset(tuple(parameter.shape), parameter.device), parameter.dtype)
    packed = torch.nn.Parameter(unset, requires_grad=False)
    packed.__dict__.update({**parameter.__dict__, "was_trainable": parameter.requires_grad})
    return packed


def keep_packed(model: Any, quant: BaseQuant) -> None:
    """Of a model that was built inside ``packing``: make dense (NaN) again what ``quant`` does not store as codes.

    Before ``apply_lora`` and DDP. Collectives and errors of ``quantize_base``.
    """
    chunks = chunks_of(model)
    plan = planned(chunks, quant, built_packed=True)
    kept = {id(one.parameter) for one in plan.matrices}
    for chunk in chunks:
        for module in chunk.modules():
            for name, parameter in _parameters(module):
                if id(parameter) not in kept and isinstance(parameter, PackedWeight):
                    module._parameters[name] = _unpacked(parameter, parameter.device)


def _unpacked(packed: Any, device: torch.device) -> torch.nn.Parameter:
    values = torch.full(packed.shape, float("nan"), dtype=packed.dtype, device=device)
    dense = torch.nn.Parameter(values, requires_grad=packed.was_trainable)
    dense.__dict__.update(noted(packed))
    return dense


@contextlib.contextmanager
def dense_on_host(model: Any) -> Iterator[None]:
    """Inside, unset weights are dense ones in host memory, for a loader that writes to parts of a tensor (torch_dist).

    On exit each is quantised. So the whole model is in host memory for a while, and never on the device.
    """
    swapped = []
    for chunk in chunks_of(model):
        for one in matrices_of(chunk):
            packed = one.parameter
            if isinstance(packed, PackedWeight) and not packed.packed.loaded:
                one.base.module._parameters[one.attribute] = _unpacked(packed, torch.device("cpu")).requires_grad_(
                    False
                )
                swapped.append((one.base.module, one.attribute, packed))
    try:
        yield
    finally:
        with torch.no_grad():
            for module, attribute, packed in swapped:
                dense, module._parameters[attribute] = module._parameters[attribute], packed
                packed.copy_(dense)


def finish_packing(model: Any, quant: BaseQuant, *, codes_of: str | os.PathLike | None = None) -> QuantReport:
    """End of loading of a model that was built inside ``packing``, wrapped or not.

    Args:
        codes_of: as of ``quantize_base``.
    Collectives:
        one all_gather_object over the world; per matrix an all_gather over its tensor-parallel group.
    Raises:
        UsageError, ValueError: a weight into which nothing was loaded; codes that are not those of what was.
    """
    chunks = chunks_of(model)
    matrices = tuple(one for chunk in chunks for one in matrices_of(chunk) if isinstance(one.parameter, PackedWeight))

    def check() -> None:
        for one in matrices:
            if not one.parameter.packed.loaded:
                raise ValueError(f"{one.name}: nothing was loaded into this 4-bit base weight")

    everywhere(check)
    return compress(chunks, Plan(matrices, ()), quant, codes_in(codes_of, quant))


def _parameters(module: torch.nn.Module) -> list[tuple[str, Any]]:
    return list(module._parameters.items())
