"""``save_adapter``: adapters, optimizer, scheduler, random states and step, as one checkpoint directory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from slime_plugins.lora.adapters import config_of, refuse_trained_base, state_of
from slime_plugins.lora.checkpoint import directory, rng, storage
from slime_plugins.lora.checkpoint.manifest import Manifest
from slime_plugins.lora.checkpoint.model import (
    Slot,
    adapters_of,
    fingerprint_of_model,
    parallelism,
    slots_of,
)
from slime_plugins.lora.checkpoint.optimizer import OptimizerState, stored_states
from slime_plugins.lora.checkpoint.writer import complete, pack_common
from slime_plugins.lora.names import in_layer_order
from slime_plugins.lora.parallel import all_gather, attempt, everywhere, gather, on_rank_0, rank


@dataclass
class AdapterSave:
    """A save in progress, or done. ``finish`` is collective."""

    path: Path
    """Where the checkpoint is once it is finished."""
    _complete: Callable[[], None] | None = field(default=None, repr=False)

    @property
    def finished(self) -> bool:
        return self._complete is None

    def finish(self) -> Path:
        """Wait for the files of all ranks and publish the checkpoint. Call on all ranks; again is harmless.

        Raises:
            ValueError, OSError: on every rank, when any rank could not write. Nothing is published then.
        """
        if self._complete is not None:
            complete, self._complete = self._complete, None
            complete()
        return self.path


def save_adapter(
    model,
    path: str | os.PathLike,
    *,
    optimizer=None,
    scheduler=None,
    step: int | None = None,
    async_save: bool = False,
) -> AdapterSave:
    """Write a checkpoint to ``path``/iter_<step>, loadable at any parallelism. Call on all ranks.

    Every shard is written once, whatever the data-parallel size: 2 bytes a bf16 parameter, and with an Adam
    optimizer 12 more for float32 master and moments. A reader sees the old state of ``path`` or the new one:
    ``latest_checkpointed_iteration.txt`` moves last. An earlier asynchronous save of this model is finished first.

    Args:
        model: a module or the list of this rank's pipeline chunks, wrapped or not.
        optimizer: Megatron's optimizer over the adapters.
        scheduler: anything with ``state_dict`` of numbers, strings and tensors.
        step: None writes ``path``/release.
        async_save: return when the values are copied; files are written by a thread, and the checkpoint is
            published by ``finish`` of what is returned, or by the next save or load of this model.
    Collectives:
        object gathers over the world; over data-parallel groups one all_reduce per optimizer state.
    Raises:
        ValueError, OSError: on every rank alike; nothing is published. Among the reasons: a value that is not
            finite, a base that trains too (an adapter alone would lose it), an optimizer that trains other things.
    """
    finish_pending(model)
    config, state = config_of(model), everywhere(lambda: OptimizerState(optimizer))
    slots = slots_of(model)
    everywhere(lambda: _check(model, slots, state if optimizer is not None else None))
    tensors, scalars, names = state.gather()
    shards = [shard for slot in slots for shard in slot.shards(_states(slot, tensors, names))]
    everywhere(lambda: _check_finite(slots, shards))
    common = _common(step, scheduler, scalars)
    adapters: dict[str, Any] = {}
    for part in all_gather(adapters_of(model)):
        adapters.update(part)
    manifest = Manifest(
        step=step,
        config=config,
        adapters=dict(sorted(adapters.items(), key=lambda item: in_layer_order(item[0]))),
        base=fingerprint_of_model(model),
        optimizer=None if optimizer is None else {"states": names, "scalars": scalars},
        parallelism=parallelism(),
    )
    staged = on_rank_0(lambda: directory.stage(path, step))
    writer = _Writer(staged, shards)
    save = AdapterSave(staged.parent / directory.name_of(step), lambda: _finish(writer, common, manifest))
    if not async_save:
        writer.run()
        save.finish()
        return save
    writer.start()
    state_of(model).pending_save = save
    return save


def finish_pending(model) -> None:
    """Publish an asynchronous save of this model that has not been finished yet. Collective."""
    state = state_of(model)
    pending, state.pending_save = state.pending_save, None
    if pending is not None:
        pending.finish()


class _Writer(threading.Thread):
    """Writes this rank's data file. No communication, so that it may run beside training."""

    def __init__(self, staged: Path, shards: list[storage.Shard]):
        super().__init__(name="slime-lora checkpoint writer")
        self.staged, self.shards = staged, shards
        self.outcome: tuple[storage.Written | None, Exception | None] | None = None

    def run(self) -> None:
        self.outcome = attempt(lambda: storage.write_shards(self.staged, rank(), self.shards))
        self.shards = []

    def wait(self) -> storage.Written:
        """What was written. Raises what ``run`` met."""
        if self.ident is not None:
            self.join()
        if self.outcome is None:
            raise OSError(f"the thread that writes {self.staged} has died")
        written, problem = self.outcome
        if written is None:
            raise problem or OSError(f"{self.staged}: nothing was written")
        return written


def _finish(writer: _Writer, common: bytes, manifest: Manifest) -> None:
    written, problem = attempt(writer.wait)
    outcomes = gather((written, problem))

    def publish() -> None:
        for _, problem in outcomes:
            if problem is not None:
                directory.discard(writer.staged)
                raise problem
        complete(writer.staged, [written for written, _ in outcomes if written is not None], common, manifest)

    on_rank_0(publish)


def _states(slot: Slot, tensors: Mapping, names: Sequence[str]) -> list[torch.Tensor]:
    return [tensors[slot.parameter][name] for name in stored_states(names, slot.parameter.dtype)] if names else []


def _check(model, slots, state: OptimizerState | None) -> None:
    refuse_trained_base(model)
    if state is not None:
        state.check_trains({slot.parameter for slot in slots})


def _check_finite(slots: list[Slot], shards: list[storage.Shard]) -> None:
    """Also of parameters that another rank writes: a replica gone wrong is a run gone wrong."""
    bad = [slot.pieces[0].name for slot in slots if not torch.isfinite(slot.parameter).all()]
    bad += [shard.key for shard in shards if not torch.isfinite(shard.data).all()]
    if bad:
        raise ValueError(f"{bad[0]} is not finite (one of {len(bad)} such tensors); nothing was saved")


def _common(step: int | None, scheduler, scalars: dict[str, Any]) -> bytes:
    """Content of ``common.pt`` on rank 0, b"" elsewhere. Collective."""
    states = gather(rng.local_state())
    state = scheduler.state_dict() if scheduler is not None else None
    pack = partial(pack_common, step=step, scheduler=state, scalars=scalars, rng=rng.pack(states))
    return everywhere(lambda: pack() if rank() == 0 else b"")
