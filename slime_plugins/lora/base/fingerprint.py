"""Which base an adapter belongs to: its architecture, and a checksum of every layer that no parallelism changes.

A layer's checksum is the sum, and the sum of squares, of the float32 bit patterns of all its matrices, modulo 2**64.
Sums do not depend on who holds which rows, nor on whether q, k, v are fused: a Megatron model at any parallelism and
a Hugging Face directory give the same digits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from slime_plugins.lora.base.checkpoint import BaseCheckpoint, Weight
from slime_plugins.lora.base.weights import DTYPES, read_weight

_HF_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_CHUNK = 1 << 24  # elements at a time: the bit patterns take 8 bytes each
# Hugging Face config key(s) -> name here, which is Megatron's.
_ARCHITECTURE = {
    "num_layers": ("num_hidden_layers",),
    "hidden_size": ("hidden_size",),
    "ffn_hidden_size": ("intermediate_size",),
    "num_attention_heads": ("num_attention_heads",),
    "num_query_groups": ("num_key_value_heads", "num_attention_heads"),
    "kv_channels": ("head_dim",),
    "num_moe_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
}


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """int64 [2] on the tensor's device; adds up over the pieces of a tensor."""
    total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for piece in tensor.detach().reshape(-1).split(_CHUNK):
        bits = piece.float().view(torch.int32).long()
        total += torch.stack([bits.sum(), (bits * bits).sum()])
    return total


def digits(total: torch.Tensor) -> str:
    """A checksum as text: 32 hexadecimal digits."""
    return "".join(f"{value & (2**64 - 1):016x}" for value in total.tolist())


def architecture_of_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of a base from its ``config.json``."""
    found = {}
    for name, keys in _ARCHITECTURE.items():
        found[name] = next((config[key] for key in keys if config.get(key) is not None), None)
    if found["kv_channels"] is None and found["hidden_size"] and found["num_attention_heads"]:
        found["kv_channels"] = found["hidden_size"] // found["num_attention_heads"]
    return found


def architecture_of_model(config) -> dict[str, Any]:
    """Sizes of a base from Megatron's TransformerConfig."""
    return {name: getattr(config, name, None) for name in _ARCHITECTURE}


def fingerprint_of_hf(checkpoint: BaseCheckpoint, dtype: str, layers: Sequence[int]) -> dict[str, Any]:
    """Fingerprint of a Hugging Face checkpoint as a model in ``dtype`` has it. Reads the given layers."""
    return {
        "architecture": architecture_of_hf(checkpoint.config),
        "dtype": dtype,
        "layers": {str(n): _hf_layer(checkpoint, n, getattr(torch, dtype)) for n in layers},
    }


def dtype_of_hf(checkpoint: BaseCheckpoint) -> str:
    """Of the matrices of the first layer. Raises ValueError for one that is not held in 16, 32 or 64 bits."""
    weight = next(_matrices(checkpoint, 0), None)
    if weight is None or weight.dtype not in DTYPES:
        found = weight.dtype if weight else "no matrix"
        raise ValueError(f"{checkpoint.directory}: {found} in the first layer; expected one of {', '.join(DTYPES)}")
    return str(DTYPES[weight.dtype]).removeprefix("torch.")


def _hf_layer(checkpoint: BaseCheckpoint, layer: int, dtype: torch.dtype) -> str:
    total = torch.zeros(2, dtype=torch.int64)
    for weight in _matrices(checkpoint, layer):
        total += checksum(read_weight(weight).to(dtype))
    return digits(total)


def _matrices(checkpoint: BaseCheckpoint, layer: int) -> Iterator[Weight]:
    for name, weight in checkpoint.weights.items():
        match = _HF_LAYER.match(name)
        if match and int(match[1]) == layer and len(weight.shape) == 2:
            yield weight


def differences(saved: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What tells the base of a checkpoint from another base; [] if nothing that both sides know does."""
    found = []
    for name, was in saved["architecture"].items():
        now = other["architecture"].get(name)
        if None not in (was, now) and was != now:
            found.append(f"base {name} {was} in the checkpoint, {now} here")
    if saved.get("quantization") != other.get("quantization"):
        was, now = (_stored(one.get("quantization")) for one in (saved, other))
        found.append(f"base {was} in the checkpoint, {now} here")
    if found or saved["dtype"] != other["dtype"]:  # equal weights in another dtype have other bits
        return found
    changed = [int(n) for n, digest in saved["layers"].items() if other["layers"].get(n, digest) != digest]
    if changed:
        compared = len(saved["layers"].keys() & other["layers"].keys())
        found.append(f"base weights differ in {len(changed)} of {compared} layers compared, from layer {min(changed)}")
    return found


def _stored(quantization: Mapping[str, Any] | None) -> str:
    if quantization is None:
        return "dense"
    scales = "nested" if quantization["double_quant"] else "plain"
    exclude = ", ".join(quantization["exclude"])
    return f"{quantization['form']} with {scales} scales" + (f" but {exclude}" if exclude else "")
