"""``load_adapter``: everything is compared and read before anything is changed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slime_plugins.lora.adapters import config_of
from slime_plugins.lora.base import fingerprint as base
from slime_plugins.lora.checkpoint import directory, rng
from slime_plugins.lora.checkpoint.manifest import Manifest, adapter_differences
from slime_plugins.lora.checkpoint.model import Slot, adapters_of, fingerprint_of_model, parallelism, slots_of
from slime_plugins.lora.checkpoint.optimizer import MASTER, RATIO, OptimizerState, stored_states
from slime_plugins.lora.checkpoint.save import finish_pending
from slime_plugins.lora.checkpoint.storage import TensorReader
from slime_plugins.lora.checkpoint.writer import read_common
from slime_plugins.lora.layers.pieces import Piece
from slime_plugins.lora.parallel import all_gather, everywhere, on_rank_0, rank


@dataclass(frozen=True, kw_only=True)
class LoadedAdapter:
    """What ``load_adapter`` restored."""

    path: Path
    step: int | None
    optimizer: bool
    """Masters and moments are those of the checkpoint; else masters are the loaded weights, and moments are zero."""
    scheduler: bool
    rng: bool
    """Random states are restored; they cannot be at another parallelism than that of the save."""


def load_adapter(
    model,
    path: str | os.PathLike,
    *,
    optimizer=None,
    scheduler=None,
    fresh_optimizer: bool = False,
    restore_rng: bool = True,
) -> LoadedAdapter:
    """Load a checkpoint of ``save_adapter`` into an adapted model, at any parallelism. Call on all ranks.

    Hand over the optimizer if it exists already: it keeps float32 copies of the parameters, which would otherwise
    undo the load at its first step. Learning rate, betas and the like stay those of this run (or the scheduler's).

    Args:
        model: a module or the list of this rank's pipeline chunks, wrapped or not.
        path: a run's directory (its latest checkpoint is taken) or one checkpoint in it.
        fresh_optimizer: start the optimizer anew from the loaded weights, whatever the checkpoint holds.
        restore_rng: take random states over, where the parallelism is that of the save.
    Collectives:
        object gathers over the world.
    Raises:
        UsageError: there is no checkpoint at ``path``.
        ValueError, OSError: on every rank alike, naming what differs or what is damaged. Nothing has been changed.
    """
    finish_pending(model)
    config_of(model)
    found, manifest, reader = on_rank_0(lambda: _open(path))
    slots = slots_of(model)
    _compare(model, slots, manifest, reader)
    state = everywhere(lambda: OptimizerState(optimizer))
    wants_state = optimizer is not None and not fresh_optimizer
    everywhere(lambda: _check_optimizer(state, slots, manifest, reader, wants_state, optimizer is not None))
    weights, states = everywhere(lambda: _read(slots, manifest, reader, wants_state))
    common = everywhere(lambda: read_common(found))
    if scheduler is not None:
        everywhere(lambda: _load_scheduler(scheduler, common["scheduler"], found))
    # From here on nothing can fail for a reason that a user could mend.
    with torch.no_grad():
        for slot in slots:
            slot.parameter.copy_(weights[slot.parameter])
    if optimizer is not None:
        state.restart()
    if wants_state and manifest.optimizer is not None:
        state.restore(manifest.optimizer["states"], manifest.optimizer["scalars"], lambda p, name: states[p][name])
    same = parallelism() == manifest.parallelism
    if restore_rng and same:
        rng.set_local_state(rng.unpack(common["rng"], rank()))
    return LoadedAdapter(
        path=found,
        step=manifest.step,
        optimizer=wants_state,
        scheduler=scheduler is not None,
        rng=restore_rng and same,
    )


def _open(path: str | os.PathLike) -> tuple[Path, Manifest, TensorReader]:
    found = directory.find(path)
    manifest = Manifest.read(found)
    reader = TensorReader.open(found)
    reader.check_files()
    return found, manifest, reader


def _compare(model, slots: list[Slot], manifest: Manifest, reader: TensorReader) -> None:
    """Raise ValueError on every rank, with all that this model and the checkpoint do not have alike."""
    adapters: dict[str, Any] = {}
    extents: dict[str, tuple] = {}
    mine = {piece.name: slot.extent(piece)[0] for slot in slots for piece in slot.pieces}
    for part, keys in all_gather((adapters_of(model), mine)):
        adapters.update(part)
        extents.update(keys)
    fingerprint = fingerprint_of_model(model)

    def compare() -> None:
        found = adapter_differences(manifest.adapters, adapters)
        found = found or _shape_differences(reader, extents)
        found += base.differences(manifest.base, fingerprint)
        if found:
            raise ValueError(f"{reader.directory} does not fit this model: {'; '.join(found)}")

    on_rank_0(compare)


def _shape_differences(reader: TensorReader, extents: Mapping[str, tuple]) -> list[str]:
    weights = {key: tuple(e.shape) for key, e in reader.index.items() if not key.startswith("optimizer.")}
    missing, extra = sorted(extents.keys() - weights.keys()), sorted(weights.keys() - extents.keys())
    found = [f"{what} {keys[0]} (one of {len(keys)})" for what, keys in (("no", missing), ("extra", extra)) if keys]
    return found + [
        f"{key} is {list(weights[key])} in the checkpoint, {list(shape)} here"
        for key, shape in extents.items()
        if weights.get(key, shape) != shape
    ]


def _check_optimizer(
    state: OptimizerState, slots: list[Slot], manifest: Manifest, reader: TensorReader, wanted: bool, given: bool
) -> None:
    if given:
        state.check_trains({slot.parameter for slot in slots})
    if wanted and manifest.optimizer is None:
        raise ValueError(f"{reader.directory} holds no optimizer state; load with fresh_optimizer=True to start anew")
    saved = (manifest.optimizer or {}).get("scalars", {}).get(RATIO, 1.0)
    if wanted and saved != state.lora_plus_ratio:
        raise ValueError(
            f"{reader.directory}: its optimizer ran with --lora-plus-ratio {saved:g}, this one runs with "
            f"{state.lora_plus_ratio:g}; give the same, or start the optimizer anew"
        )
    for slot in slots if wanted else ():
        for piece in slot.pieces:
            count = len(_stored(slot, piece, manifest, reader))
            entry = reader.index.get(slot.state_key(piece))
            if count and (entry is None or tuple(entry.shape) != (count, *slot.extent(piece)[0])):
                raise ValueError(f"{reader.directory}: {slot.state_key(piece)} is missing or of another shape")


def _stored(slot: Slot, piece: Piece, manifest: Manifest, reader: TensorReader) -> list[str]:
    """Optimizer states that the checkpoint holds of one piece."""
    assert manifest.optimizer is not None, "asked for states that the checkpoint does not have"
    return stored_states(manifest.optimizer["states"], getattr(torch, reader.index[piece.name].dtype))


def _read(slots: list[Slot], manifest: Manifest, reader: TensorReader, wanted: bool):
    """Weights by parameter, and optimizer states by parameter and name, in the checkpoint's dtypes."""
    weights, states = {}, {}
    for slot in slots:
        weights[slot.parameter] = slot.read_weight(reader)
        if wanted:
            names = _stored(slot, slot.pieces[0], manifest, reader)
            states[slot.parameter] = dict(zip(names, slot.read_states(reader, len(names)) if names else ()))
            states[slot.parameter].setdefault(MASTER, weights[slot.parameter])
    for tensor in [*weights.values(), *(t for found in states.values() for t in found.values())]:
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{reader.directory} holds values that are not finite")
    return weights, states


def _load_scheduler(scheduler, state: Mapping[str, Any] | None, path: Path) -> None:
    if state is None:
        raise ValueError(f"{path} holds no scheduler state; load without scheduler")
    if hasattr(scheduler, "num_steps"):
        scheduler.num_steps = 0  # Megatron's adds the checkpoint's steps to its own
    try:
        scheduler.load_state_dict(state)
    except AssertionError as error:  # how Megatron says that a flag has changed
        raise ValueError(f"the scheduler refuses the state in {path}: {error}") from None
