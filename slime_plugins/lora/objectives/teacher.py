"""A distillation teacher out of the student's own model: its base with no adapter, its own or another.

Call on all ranks.

One copy of the base serves both. What another adapter costs is its own size, whatever its rank; it takes the place of
the student's parameters while it teaches, so the student's are neither copied nor touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from slime_plugins.lora.adapters import adapters_disabled, config_of, iter_adapters, state_of
from slime_plugins.lora.checkpoint import directory
from slime_plugins.lora.checkpoint.load import load_adapter
from slime_plugins.lora.checkpoint.manifest import Manifest
from slime_plugins.lora.config import LoRAConfig
from slime_plugins.lora.ends.import_ import import_peft
from slime_plugins.lora.layers import Carrier, LoRALinear, spec_for
from slime_plugins.lora.layers.carrier import install
from slime_plugins.lora.parallel import on_rank_0
from slime_plugins.lora.targets import Targets

EMA_DECAY = 0.99


class Teacher:
    """``active`` makes the model the teacher; ``follow`` is for after the student's optimizer steps."""

    def __init__(self, model: Any, kind: str, ema_decay: float | None = None):
        """The student's adapters have their first values already.

        Args:
            kind: ``base``; ``live``, the student as it is; ``ema``, an average of its adapters over its optimizer
                steps; else the directory of a PEFT adapter, or of a checkpoint of ``save_adapter``, for linears that
                the student adapts.
            ema_decay: share of the average that stays at a step; None takes ``EMA_DECAY``.
        Raises:
            UsageError, OSError, ValueError: the directory's adapter does not fit, on every rank alike.
        """
        self._model, self._kind = model, kind
        self._decay = (EMA_DECAY if ema_decay is None else ema_decay) if kind == "ema" else None
        self._adapter: AnotherAdapter | None = None
        if kind == "ema":
            self._adapter = AnotherAdapter(model, config_of(model), torch.float32)  # bfloat16 loses such small steps
            self._move(1.0)
        elif kind not in ("base", "live"):
            self._adapter = read_another(model, kind)

    def active(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model is the teacher; afterwards the student again, bit for bit."""
        if self._adapter is not None:
            return self._adapter.worn()
        return adapters_disabled(self._model) if self._kind == "base" else contextlib.nullcontext()

    def follow(self) -> None:
        """After an optimizer step: an average moves by (1 - decay) of the way to the student."""
        if self._decay is not None:
            self._move(1 - self._decay)

    @torch.no_grad()
    def _move(self, share: float) -> None:
        assert self._adapter is not None
        for linear, parameters in self._adapter.parameters.items():
            for name, live in linear.lora_parameters().items():
                parameters[name].lerp_(live.float(), share)


class AnotherAdapter:
    """A second adapter for linears that are adapted: of other targets among them, ranks, scaling, layout."""

    def __init__(self, model: Any, config: LoRAConfig, dtype: torch.dtype | None = None):
        """Raises UsageError as ``spec_for`` does. ``dtype``: of its parameters; None takes the student's."""
        self._model, self._config = model, config
        targets = Targets(config.target_modules, config.exclude_modules)
        self._specs, self._without = {}, []
        self.parameters: dict[LoRALinear, dict[str, torch.nn.Parameter]] = {}
        for linear in iter_adapters(model):
            parts = targets.parts_of(linear.lora.name)
            if parts:
                self._specs[linear] = spec_for(linear.lora_base, linear.lora.name, parts, config)
                self.parameters[linear] = {}
            else:
                self._without.append(linear)
        for linear in self.parameters:
            own = dtype or next(iter(linear.lora_parameters().values())).dtype
            with self._worn_by(linear):
                initial = {entry.name: linear.lora_initial(entry) for entry in linear.lora_table}
                values = {name: value.to(linear.lora_base.device, own) for name, value in initial.items()}
                install(linear, values, partial_gradients=False, expert_buffers=False)
                self.parameters[linear] = linear.lora_parameters()
                for name, parameter in self.parameters[linear].items():
                    parameter.requires_grad_(False)
                    del linear._parameters[name]

    @contextlib.contextmanager
    def worn(self) -> Iterator[None]:
        """Inside, this is the adapter that the model has, to run, read and write; no gradient reaches it."""
        state = state_of(self._model)
        config, state.config = state.config, self._config
        with contextlib.ExitStack() as worn:
            for linear in self.parameters:
                worn.enter_context(self._worn_by(linear))
            for linear in self._without:
                worn.enter_context(_plain(linear))
            try:
                yield
            finally:
                state.config = config

    @contextlib.contextmanager
    def _worn_by(self, linear: LoRALinear) -> Iterator[None]:
        students, spec, table = linear.lora_parameters(), linear.lora, linear.lora_table
        enabled = linear.lora_enabled
        for name in students:
            del linear._parameters[name]
        linear.lora, linear.lora_enabled = self._specs[linear], True
        linear.lora_table = linear.lora_describe()
        linear._parameters.update(self.parameters[linear])
        try:
            yield
        finally:
            for name in self.parameters[linear]:
                linear._parameters.pop(name, None)
            linear.lora, linear.lora_table, linear.lora_enabled = spec, table, enabled
            linear._parameters.update(students)


@contextlib.contextmanager
def _plain(linear: LoRALinear) -> Iterator[None]:
    """Inside, the linear is one that has never been adapted."""
    form = type(linear)
    plain: Any = next(cls for cls in form.__mro__ if not issubclass(cls, Carrier))
    linear.__class__ = plain
    try:
        yield
    finally:
        linear.__class__ = form


@torch.no_grad()
def copy_of(model: Any) -> AnotherAdapter:
    """The model's adapters as they are now."""
    other = AnotherAdapter(model, config_of(model))
    for linear, parameters in other.parameters.items():
        for name, live in linear.lora_parameters().items():
            parameters[name].copy_(live)
    return other


def read_another(model: Any, path: str) -> AnotherAdapter:
    """The adapter of a PEFT directory or of a checkpoint, beside the model's own. Raises as ``Teacher`` does."""
    of_peft = (Path(path) / "adapter_config.json").is_file()
    config = on_rank_0(lambda: LoRAConfig.from_peft(path) if of_peft else Manifest.read(directory.find(path)).config)
    other = AnotherAdapter(model, config)
    with other.worn():
        if of_peft:
            import_peft(model, path, carries=True)  # nothing is written of a teacher
        else:
            load_adapter(model, path, restore_rng=False)
    return other
