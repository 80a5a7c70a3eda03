"""Module names in both vocabularies, as one table: Megatron's and Hugging Face's. Pure, no imports.

A new linear is a new row. Experts have two names: stacked, as they are adapted (``mlp.experts.linear_fc1``), and one
by one, as checkpoints hold them (``mlp.experts.7.linear_fc1``, ``mlp.experts.7.gate_proj``).
"""

from __future__ import annotations

import re

_GATED = {"linear_fc1": ("gate_proj", "up_proj"), "linear_fc2": ("down_proj",)}

# Megatron path in a layer -> (HF parent, HF leaves in the order of the fused rows).
DENSE = {
    "self_attention.linear_qkv": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "self_attention.linear_proj": ("self_attn", ("o_proj",)),
    **{f"mlp.{leaf}": ("mlp", hf_leaves) for leaf, hf_leaves in _GATED.items()},
}
"""Llama, Qwen2, Qwen3; q_proj of gated attention (Qwen3-Next) holds the gate too."""
MLA = {
    "self_attention.linear_q_proj": ("self_attn", ("q_proj",)),
    "self_attention.linear_q_down_proj": ("self_attn", ("q_a_proj",)),
    "self_attention.linear_q_up_proj": ("self_attn", ("q_b_proj",)),
    "self_attention.linear_kv_down_proj": ("self_attn", ("kv_a_proj_with_mqa",)),
    "self_attention.linear_kv_up_proj": ("self_attn", ("kv_b_proj",)),
}
"""In place of linear_qkv in DeepSeek-V3, Kimi-K2, GLM-4.7-Flash; linear_q_proj where the query has no low rank."""
EXPERTS = {f"mlp.experts.{leaf}": ("mlp.experts", hf_leaves) for leaf, hf_leaves in _GATED.items()}
SHARED_EXPERTS = {f"mlp.shared_experts.{leaf}": ("mlp.shared_experts", leaves) for leaf, leaves in _GATED.items()}
"""Spelled ``shared_expert`` in Qwen's checkpoints: see ``spellings``."""

LINEARS = {**DENSE, **MLA, **EXPERTS, **SHARED_EXPERTS}
"""What ``all-linear`` means."""
BY_NAME_ONLY = {"mlp.router": ("mlp", ("gate",))}
"""Adapted only where a target names it."""
_ROWS = {**LINEARS, **BY_NAME_ONLY}

_MEGATRON = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_HF = re.compile(r"model\.layers\.(\d+)\.(.+)\.(\w+)")
_EXPERT = re.compile(r"^(mlp\.experts)\.(\d+)(?=\.|$)")


def hf_names(megatron_name: str) -> tuple[str, ...]:
    """``decoder.layers.3.mlp.linear_fc1`` -> ``("model.layers.3.mlp.gate_proj", "model.layers.3.mlp.up_proj")``.

    Layer numbers are global, counted from 0; expert numbers too, where there is one. Raises KeyError for a name that
    the table does not know.
    """
    match = _MEGATRON.fullmatch(megatron_name)
    if match:
        layer, path = match.groups()
        path, expert = _without_expert(path)
        if path in _ROWS:
            parent, hf_leaves = _ROWS[path]
            return tuple(f"model.layers.{layer}.{parent}{expert}.{hf_leaf}" for hf_leaf in hf_leaves)
    raise KeyError(f"no Hugging Face name is known for Megatron module {megatron_name!r}")


def is_known(path: str) -> bool:
    """Has this path in a layer (``mlp.linear_fc1``) a row in the table?"""
    return path in _ROWS


def megatron_name(hf_name: str, *, mla: bool = False) -> tuple[str, int]:
    """``model.layers.3.self_attn.k_proj`` -> ``("decoder.layers.3.self_attention.linear_qkv", 1)``: module, part.

    Args:
        mla: the model has multi-latent attention, where q_proj is a linear of its own.
    Raises:
        KeyError: the table does not know the name.
    """
    match = _HF.fullmatch(hf_name)
    if match:
        layer, parent, hf_leaf = match.groups()
        parent, expert = _without_expert(re.sub(r"shared_expert$", "shared_experts", parent))
        for path, (hf_parent, hf_leaves) in (MLA | _ROWS if mla else _ROWS).items():
            if parent == hf_parent and hf_leaf in hf_leaves:
                path = f"mlp.experts{expert}.{path.rsplit('.', 1)[-1]}" if expert else path
                return f"decoder.layers.{layer}.{path}", hf_leaves.index(hf_leaf)
    raise KeyError(f"no Megatron module is known for Hugging Face name {hf_name!r}")


def spellings(hf_name: str) -> tuple[str, ...]:
    """Every way in which checkpoints spell a Hugging Face name of ``hf_names``."""
    qwen = hf_name.replace(".shared_experts.", ".shared_expert.")
    return (hf_name,) if qwen == hf_name else (hf_name, qwen)


def of_expert(stacked_name: str, expert: int | str) -> str:
    """``decoder.layers.3.mlp.experts.linear_fc1``, 7 -> ``decoder.layers.3.mlp.experts.7.linear_fc1``."""
    parent, leaf = stacked_name.rsplit(".", 1)
    return f"{parent}.{expert}.{leaf}"


def in_experts(name: str) -> bool:
    """Is this the name, in either vocabulary, of a layer's routed experts or of anything in them?"""
    return ".mlp.experts." in f"{name}."


def _without_expert(path: str) -> tuple[str, str]:
    """``mlp.experts.7.linear_fc1`` -> ``("mlp.experts.linear_fc1", ".7")``; other paths as they are, with ""."""
    match = _EXPERT.match(path)
    return (match[1] + path[match.end() :], f".{match[2]}") if match else (path, "")
