"""Which base trains, and do the engines hold it? They start from ``--hf-checkpoint``, the trainer maybe elsewhere."""

from __future__ import annotations

import logging
from pathlib import Path

from slime_plugins.lora.adapters import state_of
from slime_plugins.lora.base import fingerprint
from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.checkpoint.model import fingerprint_as_served, fingerprint_of_model
from slime_plugins.lora.parallel import on_rank_0, rank
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
    """Compare every layer of the base with the Hugging Face checkpoint's, where the base came from elsewhere.

    Collectives:
        those of ``fingerprint_of_model``, one broadcast_object_list.
    Raises:
        ValueError: they differ: an adapter trained on this base would be served on another one.
    """
    quant = base_quant_of(model)
    if quant is not None:  # the same path is the dense base, on which the adapter was not trained
        ours, way_out = {**fingerprint_as_served(model), "quantization": None}, _DEQUANTIZE
    elif same_base(hf_checkpoint, None, model):
        return
    else:
        ours, way_out = fingerprint_of_model(model), "give the base as --hf-checkpoint"

    def compare() -> None:
        checkpoint = BaseCheckpoint(hf_checkpoint)
        if "quantization_config" in checkpoint.config and quant is not None:
            raise ValueError(
                f"--lora-sync adapter: --hf-checkpoint {hf_checkpoint} is quantised, and it is not known whether "
                f"engines make the base of it that trains; {way_out}, or use --lora-sync merged"
            )
        if "quantization_config" in checkpoint.config:
            logger.warning("LoRA: %s is quantised: it is not known whether it is the base that trains", hf_checkpoint)
            return
        layers = [int(number) for number in ours["layers"]]
        theirs = fingerprint.fingerprint_of_hf(checkpoint, ours["dtype"], layers)
        found = fingerprint.differences(ours, theirs)
        if found:
            raise ValueError(
                f"--lora-sync adapter: the engines start from --hf-checkpoint {hf_checkpoint}, which is not the base "
                f"that trains ({'; '.join(found)}); {way_out}, or use --lora-sync merged"
            )

    if rank() == 0:
        logger.info("LoRA: comparing the base with %s", hf_checkpoint)
    on_rank_0(compare)
