"""The reference policy of a run that starts from an adapter: the base, or with ``--lora-ref start`` that adapter.

The start is the live adapter before the first step. It is kept as one more policy, as large as an adapter, and in
``--save``/reference as a checkpoint of adapters of its own, whole and readable at any parallelism: a resumed run,
whose live adapter has moved, reads it from there.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from slime_plugins.lora.parallel import rank
from slime_plugins.lora.slime.hooks.paths import adapter_step_dir, resumed_step

if TYPE_CHECKING:
    from slime_plugins.lora.slime.hooks.policies import Policies

logger = logging.getLogger(__name__)

DIRECTORY = "reference"
"""Beside the steps of a run: the adapter that it measures its KL from."""


def use_reference(store: Policies, args: Namespace, model) -> bool:
    """Make ``ref`` the start, if that is asked for; False where it is the base.

    ``store`` has the actor's adapters, which are live before and after.

    Collectives:
        those of a load or a save of an adapter.
    Raises:
        ValueError: a resumed run whose reference is not there, or was another one than the flags say.
    """
    before = _resumed_run(args)
    kept = None if before is None else adapter_step_dir(before / DIRECTORY)
    wanted = getattr(args, "lora_ref", None)
    if kept is not None and wanted != "start":
        raise ValueError(
            f"{before} was trained with --lora-ref start, its reference policy is {kept}; give --lora-ref start, or "
            "start a new run from its adapter with --lora-adapter-path"
        )
    if wanted != "start":
        if before is None and args.save and (Path(args.save) / DIRECTORY).exists():
            raise ValueError(
                f"--save {args.save} holds the reference policy of another run, which resumes would take for this "
                "one's; name another directory"
            )
        if before is None and args.lora_adapter_path:
            given = "" if wanted else "; --lora-ref start takes that adapter"
            _log("LoRA: the reference policy is the base, without the adapter that training starts from%s", given)
        return False
    if before is not None and kept is None:
        raise ValueError(
            f"--lora-ref start: {before} has no {DIRECTORY}/, the run did not keep the adapter that it started from; "
            "resume with --lora-ref base, or start anew with --lora-adapter-path"
        )
    _put(store, args, model, kept)
    return True


def _put(store: Policies, args: Namespace, model, kept: Path | None) -> None:
    from slime_plugins.lora.checkpoint.load import load_adapter
    from slime_plugins.lora.checkpoint.save import save_adapter

    if kept is not None:
        load_adapter(model, kept, restore_rng=False)
    store.backup("ref")
    ours = Path(args.save) / DIRECTORY if args.save else None
    if ours is not None and (kept is None or kept.parent.resolve() != ours.resolve()):
        save_adapter(model, ours)
    store.restore("actor")
    _log("LoRA: the reference policy is the adapter that training started from%s", f" ({kept})" if kept else "")


def _resumed_run(args: Namespace) -> Path | None:
    """The directory of the run that goes on; None for one that starts."""
    step = None if args.finetune else resumed_step(args)
    return None if step is None else step.parent


def _log(message: str, *args) -> None:
    if rank() == 0:
        logger.info(message, *args)
