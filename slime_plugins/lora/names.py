"""Module names in both vocabularies, as one table: Megatron's and Hugging Face's. Pure, no imports of ours.

A new linear is a new row; a new family of models is the rows that its layers have. Experts have two names: stacked, as
they are adapted (``mlp.experts.linear_fc1``), and one by one, as checkpoints hold them (``mlp.experts.7.linear_fc1``,
``mlp.experts.7.gate_proj``). Hugging Face names are canonical here, ``model.layers.3.mlp.shared_experts.up_proj``; how
a base spells them is known where names meet that base (``base.checkpoint``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One linear of a decoder layer."""

    path: str
    """Megatron's, within the layer: ``self_attention.linear_qkv``."""
    parent: str
    """Hugging Face's parent module within the layer: ``self_attn``."""
    leaves: tuple[str, ...]
    """Hugging Face's projections in it, in the order of the fused rows."""
    rows: str = "whole"
    """Which rows are which projection: a key of ``layout.ROWS``."""
    parallel: str = "column"
    """How Megatron's own layer specs cut it over tensor-parallel ranks; in a model, its class decides."""
    is_expert: bool = False
    """One such linear per routed expert."""
    mla: bool | None = None
    """Of layers with multi-latent attention alone (True), without it alone (False), or of both."""
    by_name_only: bool = False
    """Adapted only where a target names it: not by ``all-linear``, and not by a wildcard over a layer."""


def _mlp(path: str, parent: str, *, is_expert: bool = False) -> tuple[Linear, Linear]:
    """fc1 and fc2 of a gated MLP."""
    fc1, fc2 = f"{path}.linear_fc1", f"{path}.linear_fc2"
    return (
        Linear(path=fc1, parent=parent, leaves=("gate_proj", "up_proj"), rows="gated", is_expert=is_expert),
        Linear(path=fc2, parent=parent, leaves=("down_proj",), parallel="row", is_expert=is_expert),
    )


def _attention(leaf: str, hf_leaf: str, **kwargs) -> Linear:
    return Linear(path=f"self_attention.{leaf}", parent="self_attn", leaves=(hf_leaf,), **kwargs)


def _linear_attention(*leaves: str, **kwargs) -> tuple[Linear, ...]:
    path = "self_attention.linear_attn"
    return tuple(
        Linear(path=f"{path}.{leaf}", parent="linear_attn", leaves=(leaf,), parallel="duplicated", **kwargs)
        for leaf in leaves
    )


_TABLE = (
    # Llama, Qwen2, Qwen3; q_proj of gated attention (Qwen3-Next) holds the gate too.
    Linear(
        path="self_attention.linear_qkv",
        parent="self_attn",
        leaves=("q_proj", "k_proj", "v_proj"),
        rows="qkv",
        mla=False,
    ),
    _attention("linear_proj", "o_proj", parallel="row"),
    *_mlp("mlp", "mlp"),
    # In place of linear_qkv in DeepSeek-V3, Kimi-K2, GLM-4.7-Flash; linear_q_proj where the query has no low rank.
    _attention("linear_q_proj", "q_proj", mla=True),
    _attention("linear_q_down_proj", "q_a_proj", mla=True, parallel="duplicated"),
    _attention("linear_q_up_proj", "q_b_proj", mla=True),
    _attention("linear_kv_down_proj", "kv_a_proj_with_mqa", mla=True, parallel="duplicated"),
    _attention("linear_kv_up_proj", "kv_b_proj", mla=True),
    *_mlp("mlp.experts", "mlp.experts", is_expert=True),
    *_mlp("mlp.shared_experts", "mlp.shared_experts"),  # ``shared_expert`` in Qwen's checkpoints: see ``spellings``
    # Linear attention in slime (Qwen3.5, Qwen3-Next): Hugging Face's modules, whole on every tensor-parallel rank. Its
    # gates of one row per head are adapted by name alone: SGLang serves none of them.
    *_linear_attention("in_proj_qkv", "in_proj_z", "in_proj_qkvz", "out_proj"),
    *_linear_attention("in_proj_a", "in_proj_b", "in_proj_ba", by_name_only=True),
    Linear(path="mlp.router", parent="mlp", leaves=("gate",), parallel="duplicated", by_name_only=True),
)
LINEARS = {linear.path: linear for linear in _TABLE}
"""Megatron path in a layer -> its record."""

IN_LAYER = re.compile(r"^(?:module\.|language_model\.)*(decoder\.layers\.)(\d+)(?:\.(.+))?$")
"""A module of a decoder layer by its path in a chunk, wrapped or inside a model that sees images (slime's Qwen3.5)."""
_MEGATRON = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_HF = re.compile(r"model\.layers\.(\d+)\.(.+)\.(\w+)")
_EXPERT = re.compile(r"^(mlp\.experts)\.(\d+)(?=\.|$)")


def record_of(megatron_name: str) -> Linear:
    """The record of a module by its global name, ``decoder.layers.3.mlp.linear_fc1``, also of one expert's.

    Raises KeyError for a name that the table does not know.
    """
    return _parse(megatron_name)[1]


def _parse(megatron_name: str) -> tuple[str, Linear, str]:
    """Layer number, record, and ``.7`` for an expert's own name."""
    match = _MEGATRON.fullmatch(megatron_name)
    if match:
        path, expert = _without_expert(match[2])
        if path in LINEARS:
            return match[1], LINEARS[path], expert
    raise KeyError(f"no Hugging Face name is known for Megatron module {megatron_name!r}")


def hf_names(megatron_name: str) -> tuple[str, ...]:
    """``decoder.layers.3.mlp.linear_fc1`` -> ``("model.layers.3.mlp.gate_proj", "model.layers.3.mlp.up_proj")``.

    Layer numbers are global, counted from 0; expert numbers too, where there is one. Raises KeyError for a name that
    the table does not know.
    """
    layer, linear, expert = _parse(megatron_name)
    return tuple(f"model.layers.{layer}.{linear.parent}{expert}.{leaf}" for leaf in linear.leaves)


def is_known(path: str) -> bool:
    """Has this path in a layer (``mlp.linear_fc1``) a row in the table?"""
    return path in LINEARS


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
        found = [one for one in _TABLE if parent == one.parent and hf_leaf in one.leaves]
        # A name that only one kind of attention has tells which it is.
        found.sort(key=lambda one: one.mla is not None and one.mla is not mla)
        if found:
            path = of_expert(found[0].path, expert[1:]) if expert else found[0].path
            return f"decoder.layers.{layer}.{path}", found[0].leaves.index(hf_leaf)
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


def in_linear_attention(path: str) -> bool:
    """Is this the path, in a layer, of a projection of linear attention?"""
    return path.startswith("self_attention.linear_attn.")


def is_adapter(name: str) -> bool:
    """Is this an adapter's parameter, or a piece of one in a checkpoint? Nothing else has a name with ``lora_``."""
    return ".lora_" in f".{name}"


def in_layer_order(name: str) -> tuple:
    """A sort key that puts layer 10 after layer 2."""
    return tuple((0, int(piece), "") if piece.isdigit() else (1, 0, piece) for piece in name.split("."))


def _without_expert(path: str) -> tuple[str, str]:
    """``mlp.experts.7.linear_fc1`` -> ``("mlp.experts.linear_fc1", ".7")``; other paths as they are, with ""."""
    match = _EXPERT.match(path)
    return (match[1] + path[match.end() :], f".{match[2]}") if match else (path, "")
