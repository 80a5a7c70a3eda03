"""Walk the adapters that are in a model; switch them off; merge them into the base for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from slime_plugins.lora.config import LoRAConfig
from slime_plugins.lora.layers import Carrier, LoRALinear, TokenRows
from slime_plugins.lora.layers import iter_carriers as _carriers_in
from slime_plugins.lora.names import is_adapter
from slime_plugins.lora.parallel import chunks_of, unwrapped


@dataclass
class ModelState:
    """What is remembered about an adapted model between calls: all of it, however the model is wrapped.

    One object per model, on the innermost module of every chunk.
    """

    config: LoRAConfig
    pending_save: Any = None
    """checkpoint.save: the asynchronous save that has not been published."""
    fingerprints: dict[bool, Any] = field(default_factory=dict)
    """checkpoint.model: of what a 4-bit base was made of (True), as it multiplies (False); and when it was taken."""
    compared: Any = None
    """checkpoint.model: the directory that the base was compared with last, and its fingerprint."""
    base_source: str | None = None
    """slime.hooks: where the base was loaded from."""
    last_sync: Any = None
    """slime.hooks: what the last weight sync came to."""
    compared_with_engines: bool = False
    """slime.hooks: has the first step's log-prob difference been looked at?"""
    told_of_loss: bool = False
    """slime.hooks: has it been said what the engines' quantisation loses?"""
    base_squares: dict[LoRALinear, torch.Tensor] = field(default_factory=dict)
    """slime.hooks: sum of squares of base weights."""


def remember(model: Any, config: LoRAConfig) -> None:
    """Note that a model has been adapted."""
    state = ModelState(config)
    for chunk in chunks_of(model):
        unwrapped(chunk).lora_state = state  # type: ignore[assignment]


def state_of(model: Any) -> ModelState:
    """The state that ``apply_lora`` put on this model, also on a pipeline stage that got no adapter.

    Raises:
        ValueError: the model has none.
    """
    for chunk in chunks_of(model):
        state = getattr(unwrapped(chunk), "lora_state", None)
        if isinstance(state, ModelState):
            return state
    raise ValueError("this model has no adapters; call apply_lora on it first")


def config_of(model: Any) -> LoRAConfig:
    """The config that ``apply_lora`` put into this model. Raises ValueError as ``state_of`` does."""
    return state_of(model).config


def has_adapters(model: Any) -> bool:
    """Has ``apply_lora`` been called on this model (also where a pipeline stage got no adapter)?"""
    return bool(model) and any(hasattr(unwrapped(chunk), "lora_state") for chunk in chunks_of(model))


def iter_carriers(model: Any) -> Iterator[Carrier]:
    """Everything in a module or list of pipeline chunks (wrapped or not) that holds adapter parameters, in order."""
    for chunk in chunks_of(model):
        yield from _carriers_in(chunk)


def iter_adapters(model: Any) -> Iterator[LoRALinear]:
    """The adapted linears among them."""
    return (carrier for carrier in iter_carriers(model) if isinstance(carrier, LoRALinear))


def iter_token_rows(model: Any) -> Iterator[TokenRows]:
    """The embedding and the output layer, where rows of them train. Tied on one rank, both have the same rows."""
    return (carrier for carrier in iter_carriers(model) if isinstance(carrier, TokenRows))


def iter_merging(model: Any) -> Iterator[LoRALinear | TokenRows]:
    """Everything that changes a base weight of its own: what a merged model or weight sync has to go through."""
    yield from iter_adapters(model)
    yield from (rows for rows in iter_token_rows(model) if rows.lora_table)


def base_parameters(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Name in its chunk and parameter, of all that belong to no adapter."""
    for chunk in chunks_of(model):
        for name, parameter in chunk.named_parameters():
            if not is_adapter(name):
                yield name, parameter


def refuse_trained_base(model: Any) -> None:
    """Raise ValueError if the base trains with the adapters: a file of adapters alone would lose that."""
    trained = [name for name, parameter in base_parameters(model) if parameter.requires_grad]
    if trained:
        raise ValueError(
            f"{len(trained)} parameters of the base train too ({trained[0]} is trainable): adapters alone would not "
            "hold all that was trained; train with the base frozen (--lora-only-trainable), or save the whole model"
        )


@contextlib.contextmanager
def adapters_disabled(model: Any) -> Iterator[None]:
    """Inside, the model is its base: outputs equal the base's bit for bit. The reference policy of RL.

    Raises:
        ValueError: ``apply_lora`` has not been called: the reference would be the policy itself.
    """
    config_of(model)
    carriers = list(iter_carriers(model))
    before = [carrier.lora_enabled for carrier in carriers]
    for carrier in carriers:
        carrier.lora_enabled = False
    try:
        yield
    finally:
        for carrier, enabled in zip(carriers, before):
            carrier.lora_enabled = enabled


@contextlib.contextmanager
def merged(model: Any) -> Iterator[None]:
    """Inside, base weights hold W + scaling * B A (summed in float32, rounded once); on exit, their old bits again.

    Costs a copy of every adapted weight while it lasts: W + BA - BA is not W in bf16 (design hazard 12).
    """
    with adapters_disabled(model), contextlib.ExitStack() as replaced:
        replaced.callback(_weights_are_new, model)
        for linear in iter_merging(model):
            dense = [linear.lora_merged(index) for index in range(len(linear.lora_base.parameters))]
            replaced.enter_context(linear.lora_base.replaced(dense))
        _weights_are_new(model)
        yield


def _weights_are_new(model: Any) -> None:
    """Tell Megatron's TE linears, which keep weights that they have cast to FP8 from one microbatch to the next."""
    for chunk in chunks_of(model):
        for module in chunk.modules():
            if hasattr(module, "is_first_microbatch"):
                module.is_first_microbatch = True  # type: ignore[assignment]
