"""A base that a checkpoint holds in NF4 codes already: does it hold what a ``BaseQuant`` asks for?"""

from __future__ import annotations

from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.base.coded import Coded
from slime_plugins.lora.base.quantization import BLOCK, GROUP, BaseQuant, dense_modules
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.names import megatron_name
from slime_plugins.lora.quant.dequantize import decoder_linears, is_dequantised
from slime_plugins.lora.targets import short_name


def check_codes(quant: BaseQuant, base: BaseCheckpoint) -> None:
    """Before anything is loaded: can the weights of this checkpoint be held as ``quant`` says, with their own bits?

    Raises:
        UsageError: a linear that it does not hold in codes of this form, with the flag that says so; a checkpoint that
            ``slime-lora dequantize`` has written.
    """
    if is_dequantised(base.directory):
        raise UsageError(
            f"{base.directory} holds weights that have been through 4-bit codes, and other codes would be made of "
            "them; drop --lora-base-quant, or give the checkpoint that they were made from"
        )
    if base.coded:
        linears = decoder_linears(base)
        dense = set(dense_modules(quant, linears, mla=base.mla))
        for name in linears:
            if name not in dense:
                in_codes(base, name, short_name(megatron_name(name, mla=base.mla)[0]), quant)


def in_codes(base: BaseCheckpoint, name: str, linear: str, quant: BaseQuant) -> Coded:
    """The matrix of a linear, by its canonical name, in a checkpoint that holds codes. Raises as ``check_codes``.

    Args:
        linear: what Megatron calls it, for the message.
    """
    weight = base.coded.get(f"{base.spelled(name)}.weight")
    if weight is None:
        raise UsageError(
            f"{base.directory} holds {name} dense, as it was told to when it was quantised: add "
            f"--lora-base-quant-exclude {linear}"
        )
    if (weight.group is not None) != quant.double_quant:
        has, flag = ("nested", "drop --no-lora-base-double-quant") if weight.group else (
            "plain", "add --no-lora-base-double-quant"
        )  # fmt: skip
        raise UsageError(f"{base.directory} holds {name} with {has} scales: {flag}")
    if weight.block != BLOCK or weight.group not in (None, GROUP):
        raise UsageError(
            f"{base.directory} holds {name} in blocks of {weight.block}, and {BLOCK} alone train in 4 bits: drop "
            "--lora-base-quant to train on its dequantised weights"
        )
    return weight
