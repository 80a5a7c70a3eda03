"""A checkpoint with the weights that a 4-bit base multiplies with, dense: for engines that serve its adapters."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from slime_plugins.lora.base.checkpoint import MERGEABLE, BaseCheckpoint
from slime_plugins.lora.base.quantization import BaseQuant, check_blocks, dense_modules
from slime_plugins.lora.base.rewrite import rewrite
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.names import in_linear_attention, megatron_name, record_of
from slime_plugins.lora.quant import nf4

RECORD = "slime_lora_base.json"
"""In a dequantised checkpoint: what it was made from, and how."""


def dequantize_checkpoint(hf_checkpoint: str | os.PathLike, out: str | os.PathLike, quant: BaseQuant) -> int:
    """Write a copy in which every decoder linear has been through the codes. Returns how many.

    The values are those of a model that is quantised in the checkpoint's own dtype. Of a checkpoint that holds codes
    (bitsandbytes' NF4), its own; ``quant`` is then what nobody has asked for.

    Raises:
        UsageError: no checkpoint there, ``out`` holds something, a linear that does not divide into blocks, a form
            for one that holds codes.
        ValueError: a base that is quantised otherwise.
    """
    base = BaseCheckpoint(hf_checkpoint)
    if base.coded and quant != BaseQuant():
        raise UsageError(
            f"{base.directory} holds codes already, and they say what they are; drop the flags of a 4-bit base"
        )
    names = list(base.coded) or packed_weights(base, quant)

    def note(new: Path) -> None:
        record = {"base_quant": None if base.coded else quant.to_dict(), "made_from": base.fingerprint}
        (new / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    change = (lambda name, weight: weight) if base.coded else through_codes(quant, names)
    rewrite(base, Path(out), set(names), change, inspect=note)
    return len(names)


def is_dequantised(hf_checkpoint: str | os.PathLike) -> bool:
    """Was this directory written by ``dequantize_checkpoint``?"""
    return (Path(hf_checkpoint) / RECORD).is_file()


def through_codes(quant: BaseQuant, names: Iterable[str]) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Name, tensor -> what it is after quantisation, in its dtype; of other ``names``, as it is."""
    packed = set(names)

    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        if name not in packed:
            return weight
        codes, absmax = nf4.encode(weight)
        if quant.double_quant:
            absmax = nf4.whole_scales(absmax).decode()
        return nf4.decode(codes, absmax, weight.dtype)

    return change


def as_trained(base: BaseCheckpoint, quant: BaseQuant | None) -> dict[str, Any]:
    """Keywords of ``merge_checkpoint`` that put in place of a checkpoint's weights those that a 4-bit base multiplies
    with; none where they are these already, or the base is dense. Raises as ``dequantize_checkpoint``."""
    if quant is None or base.coded or is_dequantised(base.directory):
        return {}
    names = packed_weights(base, quant)
    return {"stored": through_codes(quant, names), "also": names}


def packed_weights(base: BaseCheckpoint, quant: BaseQuant) -> list[str]:
    """Names of the tensors of a checkpoint that ``quant`` stores as codes. Raises as ``dequantize_checkpoint``."""
    if base.quantised is not None:
        raise ValueError(f"{base.directory} is quantised already ({base.quantised}); give the dense checkpoint")
    if base.stacks:
        raise UsageError(
            f"{base.directory} holds its experts stacked ({next(iter(base.stacks.values())).tensor}), which is not "
            "read in 4 bits; save it with a tensor per expert"
        )
    linears = decoder_linears(base)
    dense = set(dense_modules(quant, linears, mla=base.mla))
    names = [name for name in linears if name not in dense]
    for name in names:
        weight = base.weights[f"{base.spelled(name)}.weight"]
        check_blocks(megatron_name(name, mla=base.mla)[0], weight.shape[1], 1)
        if weight.dtype not in MERGEABLE or weight.dtype == "F64":
            raise UsageError(f"{name} is {weight.dtype} in {base.directory}; expected BF16, F16 or F32")
    return [f"{base.spelled(name)}.weight" for name in names]


def decoder_linears(base: BaseCheckpoint) -> list[str]:
    """Of a checkpoint, canonical names of the linears of decoder layers that are packed unless excluded."""
    found, layers = [], base.text_config.get("num_hidden_layers")
    for name in sorted(map(base.canonical, base.linears)):
        try:
            owner, _ = megatron_name(name, mla=base.mla)
        except KeyError:
            continue
        number = int(owner.split(".")[2])
        plain = in_linear_attention(owner.split(".", 3)[3])  # Hugging Face's own modules stay dense
        if not plain and not record_of(owner).by_name_only and (layers is None or number < layers):
            found.append(name)  # a layer past the last is multi-token prediction
    return found
