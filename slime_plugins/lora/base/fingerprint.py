"""Which base an adapter belongs to: its architecture, and a checksum of every part that no parallelism changes.

    architecture   sizes, by Megatron's names
    dtype          that values are rounded to before their checksum
    vocab_rows     of the embedding; where a model has more (padding), embedding and head are not compared
    norms          what their weights are held around, 0 or 1; where that differs, vectors are not compared
    layers         number -> checksum of all matrices of the layer
    quantization   what the model stores it as (``BaseQuant.to_dict``); absent: dense. Checksums are of what was loaded
    rest           ``embedding``, ``head``, ``norm`` (the last one), ``layers.N``: all vectors of layer N

Sums do not depend on who holds which rows, nor on whether q, k, v are fused: a Megatron model at any parallelism and
a Hugging Face directory give the same digits. What only one side knows is not compared.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from slime_plugins.lora.base.checkpoint import MERGEABLE, BaseCheckpoint
from slime_plugins.lora.base.sums import Sums, added, checksum, digits, sums_of

__all__ = [
    "added", "architecture_of_hf", "architecture_of_model", "checksum", "differences", "digits", "dtype_of_hf",
    "fingerprint_of_hf", "number_of_layers", "weights_digest",
]  # fmt: skip

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
_NO_PARAMETERS = ("rotary_emb.inv_freq", "e_score_correction_bias")
"""Vectors in a layer of some bases that Megatron computes or holds as buffers."""
_AROUND_ZERO = ("qwen3_next", "qwen3_5", "gemma")
"""Families whose norms multiply by 1 + weight (Megatron's ``layernorm_zero_centered_gamma``)."""
_NAMES = {"embedding": "the embedding", "head": "the output layer", "norm": "the last norm"}


def architecture_of_hf(base: BaseCheckpoint | Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of a base from its ``config.json``. None for what it does not say.

    Raises ValueError for a size that is no number.
    """
    config = base.text_config if isinstance(base, BaseCheckpoint) else base.get("text_config") or base
    found: dict[str, Any] = {}
    for name, keys in _ARCHITECTURE.items():
        found[name] = next((config[key] for key in keys if config.get(key) is not None), None)
        if found[name] is not None and (type(found[name]) is not int or not 0 <= found[name] < 2**31):
            raise ValueError(f"config.json: {keys[0]} is {found[name]!r:.80}, expected a whole number")
    if config.get("kv_lora_rank"):
        found["kv_channels"] = None  # latent attention has two head sizes; what is written in this field says neither
    elif found["kv_channels"] is None and found["hidden_size"] and found["num_attention_heads"]:
        found["kv_channels"] = found["hidden_size"] // found["num_attention_heads"]
    return found


def architecture_of_model(config) -> dict[str, Any]:
    """Sizes of a base from Megatron's TransformerConfig."""
    found = {name: getattr(config, name, None) for name in _ARCHITECTURE}
    if getattr(config, "multi_latent_attention", False):
        found["kv_channels"] = None
    return found


def fingerprint_of_hf(
    base: BaseCheckpoint, dtype: str, layers: Sequence[int], sums: Mapping[str, Sums] | None = None
) -> dict[str, Any]:
    """Fingerprint of a Hugging Face checkpoint as a model in ``dtype`` has it.

    Every file is read once, the first time (see ``sums``). ``layers``: those whose matrices are wanted. ``sums``: of
    all weights, for a caller who has them.

    Raises:
        ValueError: a matrix in them is not held in 16, 32 or 64 bits, or a config that is not one.
    """
    sums = sums_of(base, dtype) if sums is None else sums
    matrices: dict[int, list[str]] = {n: [] for n in layers}
    rest: dict[str, list[str]] = defaultdict(list)
    outside, stacks = _outside(base), {place.tensor for place in base.stacks.values()}
    for name, weight in base.weights.items():
        layer, found = base.layer_of(name), sums[name].checksum
        if layer in matrices and (len(weight.shape) == 2 or name in stacks):
            if not found:
                raise ValueError(
                    f"{base.directory}: {name} is {weight.dtype}; expected one of {', '.join(MERGEABLE)} to compare"
                )
            matrices[layer].append(found)
        elif not found:
            continue
        elif name in outside:
            rest[outside[name]].append(found)
        elif layer is not None and len(weight.shape) == 1 and not name.endswith(_NO_PARAMETERS):
            rest[f"layers.{layer}"].append(found)
    return {
        "architecture": architecture_of_hf(base),
        "dtype": dtype,
        "layers": {str(n): added(found) for n, found in matrices.items()},
        "rest": {part: added(found) for part, found in rest.items()},
        "vocab_rows": base.weights[base.embedding].shape[0] if base.embedding in base.weights else None,
        "norms": 0 if str(base.text_config.get("model_type")).startswith(_AROUND_ZERO) else 1,
    }


def _outside(base: BaseCheckpoint) -> dict[str, str]:
    """Weights outside of layers -> what they are called here."""
    parent = base.embedding.removesuffix("embed_tokens.weight")
    found = {base.embedding: "embedding", f"{parent}norm.weight": "norm"}
    if not base.tied:
        found |= {"lm_head.weight": "head", f"{parent.removesuffix('model.')}lm_head.weight": "head"}
    return found


def number_of_layers(base: BaseCheckpoint) -> int:
    """Of a base, from its config. Raises ValueError where that does not say."""
    number = architecture_of_hf(base)["num_layers"]
    held = {layer for layer in map(base.layer_of, base.weights) if layer is not None}
    if not number or not set(range(number)) <= held:
        raise ValueError(
            f"{base.directory}: config.json says {number or 'nothing about'} layers, the files hold {len(held)}"
        )
    return number


def weights_digest(base: BaseCheckpoint, dtype: str | None = None) -> str:
    """SHA-256 over name, dtype, shape and every byte of every weight, however they are spread over files.

    ``dtype``: of other sums that the caller needs too; the digest does not depend on it.
    """
    sums = sums_of(base, dtype or dtype_of_hf(base))
    sha = hashlib.sha256()
    for name in sorted(base.weights):
        weight = base.weights[name]
        sha.update(f"{name} {weight.dtype} {list(weight.shape)} {sums[name].sha256}\n".encode())
    return sha.hexdigest()


def dtype_of_hf(base: BaseCheckpoint) -> str:
    """Of the first matrix in a layer that is held in 16, 32 or 64 bits, as torch calls it; float32 without one."""
    names = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    matrices = (w for n, w in base.weights.items() if base.layer_of(n) is not None and len(w.shape) == 2)
    return next((names[weight.dtype] for weight in matrices if weight.dtype in names), "float32")


def differences(saved: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What tells the base of a checkpoint from another base; [] if nothing that both sides know does."""
    unequal = _unequal(saved["architecture"], other["architecture"])
    found = [f"base {name} {was} in the checkpoint, {now} here" for name, (was, now) in unequal.items()]
    if saved.get("quantization") != other.get("quantization"):
        was, now = (_stored(one.get("quantization")) for one in (saved, other))
        found.append(f"base {was} in the checkpoint, {now} here")
    if found or saved["dtype"] != other["dtype"]:  # equal weights in another dtype have other bits
        return found
    layers = _unequal(saved["layers"], other["layers"])
    if layers:
        compared = len(saved["layers"].keys() & other["layers"].keys())
        first = min(map(int, layers))
        found.append(f"base weights differ in {len(layers)} of {compared} layers compared, from layer {first}")
    rest = _unequal(saved.get("rest") or {}, other.get("rest") or {})
    if saved.get("vocab_rows") != other.get("vocab_rows"):  # what stands in padding rows is nobody's business
        rest = {part: pair for part, pair in rest.items() if part not in ("embedding", "head")}
    if saved.get("norms") != other.get("norms"):
        rest = {part: pair for part, pair in rest.items() if part in ("embedding", "head")}
    found += [f"{what} of the base differs" for part, what in _NAMES.items() if part in rest]
    vectors = [int(part.removeprefix("layers.")) for part in rest if part.startswith("layers.")]
    if vectors:
        found.append(f"norms or biases of the base differ in {len(vectors)} layers, from layer {min(vectors)}")
    return found


def _stored(quantization: Mapping[str, Any] | None) -> str:
    """What a base is stored as (``BaseQuant.to_dict``), in words."""
    if quantization is None:
        return "dense"
    scales = "nested" if quantization["double_quant"] else "plain"
    exclude = ", ".join(quantization["exclude"])
    return f"{quantization['form']} with {scales} scales" + (f" but {exclude}" if exclude else "")


def _unequal(saved: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    pairs = {name: (was, other.get(name)) for name, was in saved.items()}
    return {name: pair for name, pair in pairs.items() if None not in pair and pair[0] != pair[1]}
