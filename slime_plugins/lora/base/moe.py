"""A decoder with routed experts as its ``config.json`` describes it: sizes and shapes, for what is reckoned from them.

Names are canonical (see ``names``). The experts of a layer are stacked, as Megatron's adapters and newer checkpoints
have them: ``model.layers.3.mlp.experts.gate_proj.weight`` is [experts, out, in]. Multi-token prediction is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slime_plugins.lora.base.experts import RoutedExperts, expert_shapes, mlp_shapes
from slime_plugins.lora.base.sizes import MOST_LAYERS, Sizes, refuse_quantised
from slime_plugins.lora.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class MoEBase:
    """Sizes of a supported family with routed experts."""

    path: Path
    architecture: str
    num_layers: int
    hidden: int
    num_heads: int
    num_query_groups: int
    """Key/value heads; with latent attention those that queries have."""
    vocab_size: int
    tied: bool
    num_experts: int
    top_k: int
    """Experts per token."""
    expert_ffn: int
    mla: bool
    layer_shapes: Callable[[int], dict[str, tuple[int, ...]]]
    """Layer number -> name in the layer, shape."""

    @classmethod
    def from_config(cls, config: dict[str, Any], path: Path) -> MoEBase:
        """Describe a base from its config alone.

        Raises:
            ValueError: an architecture that is not known here, or a size that is missing or impossible.
        """
        file, architecture = path / "config.json", architecture_of(config)
        if architecture not in ARCHITECTURES:
            raise ValueError(f"{file}: architecture {architecture!s:.80} is not supported")
        refuse_quantised(config.get("quantization_config"), file)
        read = Sizes(config, file)
        if architecture in _NO_BIAS and read.flag("attention_bias"):
            raise ValueError(f"{file}: attention_bias = true is not supported for {architecture}")
        family = ARCHITECTURES[architecture](read)
        hidden, num_heads = read.size("hidden_size"), read.size("num_attention_heads")
        return cls(
            path=path,
            architecture=architecture,
            num_layers=read.size("num_hidden_layers", most=MOST_LAYERS),
            hidden=hidden,
            num_heads=num_heads,
            num_query_groups=num_heads if family.mla else read.size("num_key_value_heads", num_heads),
            vocab_size=read.size("vocab_size"),
            tied=read.flag("tie_word_embeddings"),
            num_experts=family.num_experts,
            top_k=read.size("num_experts_per_tok", most=family.num_experts),
            expert_ffn=read.size("moe_intermediate_size"),
            mla=family.mla,
            layer_shapes=lambda number: (
                family.attention | (family.sparse if family.is_sparse(number) else family.dense)
            ),
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every parameter, experts stacked."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden)}
        for number in range(self.num_layers):
            shapes |= {f"model.layers.{number}.{name}": shape for name, shape in self.layer_shapes(number).items()}
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden)
        return shapes

    def check_parallel(self, *, tp: int, pp: int = 1, ep: int = 1, etp: int = 1) -> None:
        """Raise UsageError for a model that does not split this way."""
        for flag, size, count, what in (
            ("tp", tp, self.num_heads, "attention heads"),
            ("tp", tp, self.num_query_groups, "key/value heads"),
            ("pp", pp, self.num_layers, "layers"),
            ("ep", ep, self.num_experts, "experts"),
            ("etp", etp, self.expert_ffn, "channels of an expert"),
        ):
            if count % size:
                raise UsageError(f"--{flag} {size}: {count} {what} of {self.path} are not divisible by {size}")


@dataclass(frozen=True)
class _Family:
    attention: dict[str, tuple[int, ...]]
    """Of every layer, norms included."""
    dense: dict[str, tuple[int, ...]]
    sparse: dict[str, tuple[int, ...]]
    is_sparse: Callable[[int], bool]
    num_experts: int
    mla: bool = False


def architecture_of(config: Any) -> str | None:
    """The first of ``architectures``; None where there is none."""
    named = config.get("architectures") if isinstance(config, dict) else None
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None


def _grouped_attention(read: Sizes, *, bias: bool, qk_norm: bool) -> dict[str, tuple[int, ...]]:
    hidden, heads = read.size("hidden_size"), read.size("num_attention_heads")
    dim = read.size("head_dim", max(hidden // heads, 1))
    q, kv = heads * dim, read.size("num_key_value_heads", heads) * dim
    rows = {"q": q, "k": kv, "v": kv}
    shapes: dict[str, tuple[int, ...]] = {f"self_attn.{p}_proj.weight": (n, hidden) for p, n in rows.items()}
    shapes["self_attn.o_proj.weight"] = (hidden, q)
    shapes |= {f"self_attn.{p}_proj.bias": (n,) for p, n in rows.items() if bias}
    shapes |= {f"self_attn.{p}_norm.weight": (dim,) for p in "qk" if qk_norm}
    return shapes | _norms(hidden)


def _norms(hidden: int) -> dict[str, tuple[int, ...]]:
    return {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}


def _latent_attention(read: Sizes) -> dict[str, tuple[int, ...]]:
    hidden, heads = read.size("hidden_size"), read.size("num_attention_heads")
    nope, rope, value = (read.size(f"{name}_head_dim") for name in ("qk_nope", "qk_rope", "v"))
    latent, shapes = read.size("kv_lora_rank"), _norms(hidden)
    q, rows = "self_attn.q", heads * (nope + rope)
    if read.config.get("q_lora_rank") is None:
        shapes[f"{q}_proj.weight"] = (rows, hidden)
    else:
        low = read.size("q_lora_rank")
        shapes |= {f"{q}_a_proj.weight": (low, hidden), f"{q}_a_layernorm.weight": (low,)}
        shapes[f"{q}_b_proj.weight"] = (rows, low)
    return shapes | {
        "self_attn.kv_a_proj_with_mqa.weight": (latent + rope, hidden),
        "self_attn.kv_a_layernorm.weight": (latent,),
        "self_attn.kv_b_proj.weight": (heads * (nope + value), latent),
        "self_attn.o_proj.weight": (hidden, heads * value),
    }


def _qwen(read: Sizes, *, shared: bool, bias: bool, qk_norm: bool) -> _Family:
    experts = RoutedExperts.of_qwen(read, shared=shared)
    return _Family(
        attention=_grouped_attention(read, bias=bias, qk_norm=qk_norm),
        dense=mlp_shapes("mlp", read.size("hidden_size"), read.size("intermediate_size")),
        sparse=dict(experts.shapes),
        is_sparse=experts.is_sparse,
        num_experts=experts.count,
    )


def _deepseek(read: Sizes, attention: dict[str, tuple[int, ...]], *, mla: bool) -> _Family:
    hidden, count = read.size("hidden_size"), read.size("n_routed_experts")
    first = read.config.get("first_k_dense_replace") or 0
    if type(first) is not int or first < 0:
        raise ValueError(f"{read.file}: first_k_dense_replace is {first!r:.80}, expected a number of layers")
    shared = read.size("n_shared_experts", 1) * read.size("moe_intermediate_size")
    return _Family(
        attention=attention,
        dense=mlp_shapes("mlp", hidden, read.size("intermediate_size")),
        sparse=expert_shapes(read, count, shared),
        is_sparse=lambda number: number >= first,
        num_experts=count,
        mla=mla,
    )


def _glm(read: Sizes) -> _Family:
    bias, qk_norm = read.flag("attention_bias"), read.flag("use_qk_norm")
    return _deepseek(read, _grouped_attention(read, bias=bias, qk_norm=qk_norm), mla=False)


ARCHITECTURES: dict[str, Callable[[Sizes], _Family]] = {
    "Qwen2MoeForCausalLM": lambda read: _qwen(read, shared=True, bias=True, qk_norm=False),
    "Qwen3MoeForCausalLM": lambda read: _qwen(read, shared=False, bias=False, qk_norm=True),
    "Glm4MoeForCausalLM": _glm,
    "DeepseekV3ForCausalLM": lambda read: _deepseek(read, _latent_attention(read), mla=True),
}
"""Families with routed experts -> what their layers hold, from the config."""
_NO_BIAS = ("Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM")
"""With attention_bias these have one on other linears than q, k and v too; no published checkpoint does."""
