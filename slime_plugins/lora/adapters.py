"""Walk the adapters that are in a model; switch them off; merge them into the base for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from slime_plugins.lora.config import LoRAConfig
from slime_plugins.lora.layers import LoRALinear, OneExpert


def iter_adapters(model) -> Iterator[LoRALinear]:
    """The adapted linears of a module or list of pipeline chunks (wrapped or not), in model order."""
    for chunk in model if isinstance(model, (list, tuple)) else [model]:
        for module in chunk.modules():
            if isinstance(module, LoRALinear):
                yield module


def iter_linears(model) -> Iterator[LoRALinear | OneExpert]:
    """The same, one per base weight: stacked experts one by one, as views with an adapted linear's attributes."""
    for linear in iter_adapters(model):
        yield from linear.lora_linears()


def config_of(model) -> LoRAConfig:
    """The config that ``apply_lora`` put into this model, also on a pipeline stage that got no adapter.

    Raises:
        ValueError: the model has none.
    """
    for chunk in model if isinstance(model, (list, tuple)) else [model]:
        for module in chunk.modules():  # DDP and Float16Module wrap the chunk that carries it
            if hasattr(module, "lora_config"):
                return module.lora_config
    raise ValueError("this model has no adapters; call apply_lora on it first")


def has_adapters(model) -> bool:
    """Has ``apply_lora`` been called on this model (also where a pipeline stage got no adapter)?"""
    if not model:
        return False
    try:
        config_of(model)
    except ValueError:
        return False
    return True


def is_adapter(name: str) -> bool:
    """Is this the name of an adapter's parameter?"""
    return name.endswith((".lora_A", ".lora_B"))


@contextlib.contextmanager
def adapters_disabled(model) -> Iterator[None]:
    """Inside, the model is its base: outputs equal the base's bit for bit. The reference policy of RL.

    Raises:
        ValueError: ``apply_lora`` has not been called: the reference would be the policy itself.
    """
    config_of(model)
    linears = list(iter_adapters(model))
    before = [linear.lora_enabled for linear in linears]
    for linear in linears:
        linear.lora_enabled = False
    try:
        yield
    finally:
        for linear, enabled in zip(linears, before):
            linear.lora_enabled = enabled


@contextlib.contextmanager
def merged(model) -> Iterator[None]:
    """Inside, base weights hold W + scaling * B A (summed in float32, rounded once); on exit, their old bits again.

    Costs a copy of every adapted weight while it lasts: W + BA - BA is not W in bf16 (design hazard 12).
    """
    linears = list(iter_linears(model))
    saved: list[torch.Tensor] = []
    with adapters_disabled(model):
        try:
            for linear in linears:
                saved.append(linear.weight.detach().clone())
                _write(linear.weight, linear.weight.detach().float() + linear.lora_delta_weight())
            yield
        finally:
            for linear, weight in zip(linears, saved):
                _write(linear.weight, weight)


@torch.no_grad()
def _write(weight: torch.nn.Parameter, value: torch.Tensor) -> None:
    weight.copy_(value)
