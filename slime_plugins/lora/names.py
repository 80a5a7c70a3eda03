"""Module names in both vocabularies, as one table: Megatron's and Hugging Face's. Pure, no imports."""

from __future__ import annotations

import re

# Megatron leaf -> (Megatron parent, HF parent, HF leaves in the order of the fused rows). Qwen2, Qwen3, Llama.
LINEARS = {
    "linear_qkv": ("self_attention", "self_attn", ("q_proj", "k_proj", "v_proj")),
    "linear_proj": ("self_attention", "self_attn", ("o_proj",)),
    "linear_fc1": ("mlp", "mlp", ("gate_proj", "up_proj")),
    "linear_fc2": ("mlp", "mlp", ("down_proj",)),
}

_MEGATRON = re.compile(r"decoder\.layers\.(\d+)\.(\w+)\.(\w+)")
_HF = re.compile(r"model\.layers\.(\d+)\.(\w+)\.(\w+)")


def hf_names(megatron_name: str) -> tuple[str, ...]:
    """``decoder.layers.3.mlp.linear_fc1`` -> ``("model.layers.3.mlp.gate_proj", "model.layers.3.mlp.up_proj")``.

    Layer numbers are global, counted from 0. Raises KeyError for a name that the table does not know.
    """
    match = _MEGATRON.fullmatch(megatron_name)
    if match:
        layer, parent, leaf = match.groups()
        known_parent, hf_parent, hf_leaves = LINEARS.get(leaf, (None, None, ()))
        if parent == known_parent:
            return tuple(f"model.layers.{layer}.{hf_parent}.{hf_leaf}" for hf_leaf in hf_leaves)
    raise KeyError(f"no Hugging Face name is known for Megatron module {megatron_name!r}")


def megatron_name(hf_name: str) -> tuple[str, int]:
    """``model.layers.3.self_attn.k_proj`` -> ``("decoder.layers.3.self_attention.linear_qkv", 1)``: module, part.

    Raises KeyError for a name that the table does not know.
    """
    match = _HF.fullmatch(hf_name)
    if match:
        layer, parent, hf_leaf = match.groups()
        for leaf, (megatron_parent, hf_parent, hf_leaves) in LINEARS.items():
            if parent == hf_parent and hf_leaf in hf_leaves:
                return f"decoder.layers.{layer}.{megatron_parent}.{leaf}", hf_leaves.index(hf_leaf)
    raise KeyError(f"no Megatron module is known for Hugging Face name {hf_name!r}")
