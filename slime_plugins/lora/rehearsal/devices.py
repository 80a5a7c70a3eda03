"""Where a run computes."""

from __future__ import annotations

import sys

from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.rehearsal.settings import Settings


def gpu_count() -> int:
    """GPUs that torch sees."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def resolve_device(settings: Settings) -> str:
    """``cuda`` or ``cpu``; a warning on stderr where ``auto`` falls back to the CPU though there are GPUs.

    Raises:
        UsageError: ``--device cuda`` cannot be had.
    """
    if settings.device == "cpu":
        return "cpu"
    gpus = gpu_count()
    if gpus >= settings.world_size:
        return "cuda"
    needed = f"--tp {settings.tp} --pp {settings.pp} --dp {settings.dp} need {settings.world_size} GPUs, found {gpus}"
    if settings.device == "cuda":
        raise UsageError(f"--device cuda: {needed}; use fewer processes, or --device cpu")
    if gpus:
        print(
            f"slime-lora: warning: {needed}: running on the CPU, which is far slower; use fewer processes, "
            "or --device cpu to mean it",
            file=sys.stderr,
        )
    return "cpu"


def default_tp(*, device: str, pp: int, dp: int, sp: bool) -> int:
    """Tensor-parallel ranks where none are asked for: 2, but 1 on a machine with one GPU, which takes one process."""
    alone = pp == dp == 1 and not sp and device != "cpu"
    return 1 if alone and gpu_count() == 1 else 2
