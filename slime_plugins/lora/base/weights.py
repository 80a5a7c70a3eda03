"""Weights of a base checkpoint, read from its safetensors files one tensor at a time."""

from __future__ import annotations

import torch

from slime_plugins.lora.base.checkpoint import Weight

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Names in safetensors headers of the dtypes that an adapter can be merged into."""


def read_weight(weight: Weight) -> torch.Tensor:
    """One tensor, on the CPU. Raises ValueError for a dtype that is not in ``DTYPES``, or a file that is too short."""
    if weight.dtype not in DTYPES:
        raise ValueError(f"{weight.file}: holds {weight.dtype} weights; expected one of {', '.join(DTYPES)}")
    data = bytearray(weight.end - weight.start)
    with open(weight.file, "rb") as file:
        file.seek(weight.start)
        if file.readinto(data) != len(data):
            raise ValueError(f"{weight.file}: truncated")
    return torch.frombuffer(data, dtype=DTYPES[weight.dtype]).reshape(weight.shape)
