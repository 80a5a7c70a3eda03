"""Which base trains, and do the engines hold it? They start from ``--hf-checkpoint``, the trainer maybe elsewhere."""

from __future__ import annotations

import logging
from pathlib import Path

from slime_plugins.lora.adapters import state_of
from slime_plugins.lora.checkpoint.model import other_base
from slime_plugins.lora.parallel import rank
from slime_plugins.lora.slime.hooks.paths import step_dir

logger = logging.getLogger(__name__)


def remember_base(model, path: str, step: int | None) -> None:
    """Note where the model's base came from."""
    state_of(model).base_source = _source(path, step)


def same_base(path: str, step: int | None, model) -> bool:
    """Is this the very directory that the model's base was loaded from?"""
    return state_of(model).base_source == _source(path, step)


def _source(path: str, step: int | None) -> str:
    return str((step_dir(path, step) or Path(path)).resolve())


def refuse_other_base(model, hf_checkpoint: str) -> None:
    """Compare the whole base with the Hugging Face checkpoint's, where it came from elsewhere.

    Collectives:
        those of ``other_base``.
    Raises:
        ValueError: they differ: an adapter trained on this base would be served on another one.
    """
    if same_base(hf_checkpoint, None, model):
        return
    if rank() == 0:
        logger.info("LoRA: comparing the base with %s", hf_checkpoint)
    found = other_base(model, hf_checkpoint)
    if found:
        raise ValueError(
            f"--lora-sync adapter: the engines start from --hf-checkpoint {hf_checkpoint}, which is not the base "
            f"that trains ({'; '.join(found)}); give the base as --hf-checkpoint, or use --lora-sync merged"
        )
