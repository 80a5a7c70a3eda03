"""Which base trains, and do the engines hold it? They start from ``--hf-checkpoint``, the trainer maybe elsewhere."""

from __future__ import annotations

import logging
from pathlib import Path

from slime_plugins.lora.adapters import state_of
from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.checkpoint.model import other_base
from slime_plugins.lora.parallel import everywhere, rank
from slime_plugins.lora.quantize import base_quant_of
from slime_plugins.lora.slime.hooks.paths import step_dir

logger = logging.getLogger(__name__)

_DEQUANTIZE = (
    "it trains in 4 bits: write its weights with `slime-lora dequantize`, give them as --hf-checkpoint and the dense "
    "base as --ref-load"
)


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
    quant = base_quant_of(model)
    if quant is None and same_base(hf_checkpoint, None, model):
        return  # of a 4-bit base the same path is the dense one, on which the adapter was not trained
    way_out = "give the base as --hf-checkpoint" if quant is None else _DEQUANTIZE
    quantised = everywhere(lambda: BaseCheckpoint(hf_checkpoint)).quantised
    if quantised and quant is None and rank() == 0:
        logger.warning(
            "LoRA: %s is stored as %s: it is not known whether it is the base that trains", hf_checkpoint, quantised
        )
    if rank() == 0:
        logger.info("LoRA: comparing the base with %s", hf_checkpoint)
    found = other_base(model, hf_checkpoint, as_served=quant is not None)
    if found:
        raise ValueError(
            f"--lora-sync adapter: the engines start from --hf-checkpoint {hf_checkpoint}, which is not the base "
            f"that trains ({'; '.join(found)}); {way_out}, or use --lora-sync merged"
        )
