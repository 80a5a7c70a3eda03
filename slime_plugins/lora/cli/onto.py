"""Which weights an adapter of a 4-bit base is merged onto: a flag of ``export --merge`` and of ``merge``."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slime_plugins.lora.base.checkpoint import BaseCheckpoint
    from slime_plugins.lora.base.quantization import BaseQuant


def add_merge_onto(parser: argparse.ArgumentParser) -> None:
    """Add the flag."""
    parser.add_argument(
        "--merge-onto",
        choices=("trained", "original"),
        default="trained",
        help="an adapter of a 4-bit base: its dequantised weights, on which it was trained, or those of "
        "--hf-checkpoint, on which it answers otherwise (default: %(default)s)",
    )


def onto(quant: BaseQuant | None, base: BaseCheckpoint, wanted: str) -> dict[str, Any]:
    """Arguments for ``merge_checkpoint``; says which base it is, where there are two."""
    from slime_plugins.lora.quant.dequantize import as_trained

    found = as_trained(base, quant)
    if quant is None or not found:
        return {}
    if wanted == "original":
        print(
            f"slime-lora: warning: the adapter was trained on a {quant.form} base; merged onto the original weights "
            "it answers otherwise",
            file=sys.stderr,
        )
        return {}
    print(f"merging onto the {quant.form} base that it was trained on, dequantised")
    return found
