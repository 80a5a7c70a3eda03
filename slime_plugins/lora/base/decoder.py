"""A decoder as Hugging Face stores it, in full: its sizes, and the tensors it must have. No Megatron.

What the rehearsal builds. Names are canonical (see ``names``), the experts of a layer stacked (see ``base.experts``).

Everything that can be wrong with a directory is found from the config and the file headers, without torch, before any
process starts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.base.experts import RoutedExperts, mlp_shapes
from slime_plugins.lora.base.linear_attention import LinearAttention
from slime_plugins.lora.base.sizes import MOST_LAYERS, Sizes, refuse_quantised
from slime_plugins.lora.base.spelling import CANONICAL_LAYERS
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.names import in_experts, megatron_name, of_expert


@dataclass(frozen=True, kw_only=True)
class Family:
    """What an architecture has that its config does not say."""

    qkv_bias: bool = False
    """Bias on q, k and v."""
    qk_norm: bool = False
    """RMSNorm on each q and k head."""
    experts: Callable[[Sizes], RoutedExperts] | None = None
    linear: Callable[[Sizes, int], LinearAttention] | None = None
    """Linear attention in most layers; then the others have gates on their attention, and norms around 0."""
    module: str = "transformers"
    """Where transformers has it, in versions of 5 that have it."""


def _next_experts(read: Sizes) -> RoutedExperts:
    asked = read.config.get("norm_topk_prob") is not None
    return RoutedExperts.of_qwen(read, shared=True, renormalised=None if asked else True)


_DENSE = {
    "LlamaForCausalLM": Family(),
    "Qwen2ForCausalLM": Family(qkv_bias=True),
    "Qwen3ForCausalLM": Family(qk_norm=True),
}
DENSE = tuple(_DENSE)
"""Those of attention and MLPs alone."""
ARCHITECTURES = _DENSE | {
    "Qwen3MoeForCausalLM": Family(qk_norm=True, experts=partial(RoutedExperts.of_qwen, shared=False)),
    "Qwen3NextForCausalLM": Family(
        qk_norm=True,
        experts=_next_experts,
        linear=partial(LinearAttention.read, fused=True),
        module="transformers.models.qwen3_next",
    ),
    "Qwen3_5ForCausalLM": Family(
        qk_norm=True, linear=partial(LinearAttention.read, fused=False), module="transformers.models.qwen3_5"
    ),
    "Qwen3_5MoeForCausalLM": Family(
        qk_norm=True,
        experts=partial(RoutedExperts.of_qwen, shared=True, renormalised=True),
        linear=partial(LinearAttention.read, fused=False),
        module="transformers.models.qwen3_5_moe",
    ),
}
_SEES_IMAGES = {"Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"}
_AS_TEXT = (
    "write the language model alone with transformers, "
    "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW, save_original_format=False)"
)


@dataclass(frozen=True, kw_only=True)
class HFBase:
    """A decoder of a supported family, as its ``config.json`` describes it."""

    path: Path
    architecture: str
    num_layers: int
    hidden: int
    ffn: int
    """Channels of an MLP without experts."""
    num_heads: int
    num_query_groups: int
    """Key/value heads."""
    head_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    llama3_rope: dict | None
    """``factor, low_freq_factor, high_freq_factor, original_max_position_embeddings``, or None without scaling."""
    tied: bool
    """The output layer is the embedding."""
    max_positions: int
    coded: bool = False
    """Its files hold matrices in bitsandbytes' NF4 codes."""
    experts: RoutedExperts | None = None
    linear: LinearAttention | None = None
    rotary_share: float = 1.0
    """Of a head's features, those that rotary embeddings turn."""

    @property
    def family(self) -> Family:
        """What its architecture has."""
        return ARCHITECTURES[self.architecture]

    @property
    def gated(self) -> bool:
        """Do q_proj's rows hold, after each head's query, its output gate; and are norms 1 + weight?"""
        return self.linear is not None

    def has_experts(self, layer: int) -> bool:
        return self.experts is not None and self.experts.is_sparse(layer)

    def has_linear_attention(self, layer: int) -> bool:
        return self.linear is not None and layer in self.linear.layers

    @classmethod
    def read(cls, path: str | Path) -> HFBase:
        """Describe a checkpoint directory and check that its files hold the tensors of that description.

        Raises:
            UsageError: not a directory, no ``config.json``, no safetensors files.
            ValueError: something in the config is not supported, a file is damaged, or tensors are missing,
                unexpected or of another shape.
        """
        checkpoint = BaseCheckpoint(path)
        base = cls._from_config(checkpoint.config, Path(path))
        base = dataclasses.replace(base, coded=bool(checkpoint.coded))
        if checkpoint.layer_prefix != CANONICAL_LAYERS:
            raise ValueError(
                f"{path}: layers lie under {checkpoint.layer_prefix[:-1]}, as beside a vision tower; {_AS_TEXT}"
            )
        base._check_tensors(_stored_shapes(checkpoint))
        return base

    @classmethod
    def _from_config(cls, config: Any, path: Path) -> HFBase:
        config_file = path / "config.json"
        if not isinstance(config, dict):
            raise ValueError(f"{config_file}: expected a JSON object, got {type(config).__name__}")
        named = config.get("architectures")
        architecture = named[0] if isinstance(named, list) and named else None
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            if architecture in _SEES_IMAGES:
                raise ValueError(
                    f"{config_file}: {architecture} sees images, and text bases alone are supported; {_AS_TEXT}"
                )
            known = ", ".join(ARCHITECTURES)
            raise ValueError(f"{config_file}: architecture {architecture!s:.80} is not supported, only {known}")
        _refuse_unsupported(config, config_file, architecture)
        theta, llama3_rope = _rope(config, config_file)
        read = Sizes(config, config_file)
        hidden, num_heads = read.size("hidden_size"), read.size("num_attention_heads")
        family, num_layers = ARCHITECTURES[architecture], read.size("num_hidden_layers", most=MOST_LAYERS)
        experts = None if family.experts is None else family.experts(read)
        return cls(
            path=path,
            architecture=architecture,
            num_layers=num_layers,
            hidden=hidden,
            ffn=read.size("intermediate_size", None if experts is None else experts.ffn),
            num_heads=num_heads,
            num_query_groups=read.size("num_key_value_heads", num_heads),
            head_dim=read.size("head_dim", max(hidden // num_heads, 1)),
            vocab_size=read.size("vocab_size"),
            norm_eps=read.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            llama3_rope=llama3_rope,
            tied=read.flag("tie_word_embeddings"),
            max_positions=read.size("max_position_embeddings", 4096),
            experts=experts,
            linear=None if family.linear is None else family.linear(read, num_layers),
            rotary_share=_rotary_share(config, config_file) if family.linear is not None else 1.0,
        )

    def _check_tensors(self, shapes: dict[str, tuple[int, ...]]) -> None:
        expected = self._one_by_one()
        # A tied head may be stored all the same, and old checkpoints carry rotary buffers: transformers drops both,
        # and multi-token prediction.
        found = {name for name in shapes if not name.endswith("rotary_emb.inv_freq") and not name.startswith("mtp.")}
        found -= {"lm_head.weight"} if self.tied else set()
        if found != expected.keys():
            raise ValueError(
                f"{self.path}: tensors do not fit {self.architecture} with {self.num_layers} layers; "
                f"missing: {_listed(expected.keys() - found)}; unexpected: {_listed(found - expected.keys())}"
            )
        for name, shape in expected.items():
            if shapes[name] != shape:
                raise ValueError(f"{self.path}: {name} has shape {list(shapes[name])}, config.json says {list(shape)}")

    def _one_by_one(self) -> dict[str, tuple[int, ...]]:
        """``shapes`` with the experts taken apart, as most checkpoints hold them."""
        found: dict[str, tuple[int, ...]] = {}
        for name, shape in self.shapes().items():
            if not in_experts(name):
                found[name] = shape
                continue
            module = name.removesuffix(".weight")
            found |= {f"{of_expert(module, number)}.weight": shape[1:] for number in range(shape[0])}
        return found

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor of the base, the experts of a layer stacked: [experts, out, in]."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden)}
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden)
        for number in range(self.num_layers):
            shapes |= {f"model.layers.{number}.{name}": shape for name, shape in self._layer_shapes(number).items()}
        return shapes

    def _layer_shapes(self, number: int) -> Mapping[str, tuple[int, ...]]:
        norms = {f"{name}.weight": (self.hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        attention = self.linear.shapes if self.linear and self.has_linear_attention(number) else self._attention()
        mlp = self.experts.shapes if self.experts and self.has_experts(number) else None
        return {**norms, **attention, **(mlp or mlp_shapes("mlp", self.hidden, self.ffn))}

    def _attention(self) -> dict[str, tuple[int, ...]]:
        heads, kv_rows = self.num_heads * self.head_dim, self.num_query_groups * self.head_dim
        rows = {"q": heads * (2 if self.gated else 1), "k": kv_rows, "v": kv_rows}
        shapes: dict[str, tuple[int, ...]] = {f"self_attn.{p}_proj.weight": (n, self.hidden) for p, n in rows.items()}
        shapes["self_attn.o_proj.weight"] = (self.hidden, heads)
        if self.family.qkv_bias:
            shapes |= {f"self_attn.{p}_proj.bias": (n,) for p, n in rows.items()}
        if self.family.qk_norm:
            shapes |= {f"self_attn.{p}_norm.weight": (self.head_dim,) for p in "qk"}
        return shapes

    def linears(self) -> list[str]:
        """Names of the linears inside layers that an adapter can be of, without ``.weight``; experts stacked."""
        modules = (name.removesuffix(".weight") for name, shape in self.shapes().items() if len(shape) > 1)
        return [module for module in modules if _is_linear(module)]

    def check_parallel(
        self, *, tp: int, pp: int = 1, vpp: int | None = None, ep: int = 1, etp: int | None = None, sp: bool = False
    ) -> None:
        """Raise UsageError for a model that does not split this way. ``etp`` None: as ``tp``."""
        dense = any(not self.has_experts(number) for number in range(self.num_layers))
        for count, what in (
            (self.num_heads, "attention heads"),
            (self.num_query_groups, "key/value heads"),
            (self.ffn if dense else 0, "feed-forward channels"),
            (self.experts.shared_ffn if self.experts else 0, "channels of the shared expert"),
        ):
            if count % tp:
                raise UsageError(f"--tp {tp}: {count} {what} of {self.path} are not divisible by {tp}")
        stages = pp * (vpp or 1)
        if self.num_layers % stages:
            raise UsageError(
                f"--pp {pp}{f' --vpp {vpp}' if vpp else ''}: {self.num_layers} layers of {self.path} "
                f"are not divisible by {stages}"
            )
        self._check_experts_parallel(tp=tp, ep=ep, etp=etp, sp=sp)

    def _check_experts_parallel(self, *, tp: int, ep: int, etp: int | None, sp: bool) -> None:
        if self.experts is None:
            if ep > 1 or etp not in (None, tp):
                flag = f"--ep {ep}" if ep > 1 else f"--etp {etp}"
                raise UsageError(f"{flag}: {self.path} has no routed experts; drop it")
            return
        etp = tp if etp is None else etp
        for flag, size, count, what in (
            ("ep", ep, self.experts.count, "experts"),
            ("etp", etp, self.experts.ffn, "channels of an expert"),
        ):
            if count % size:
                raise UsageError(f"--{flag} {size}: {count} {what} of {self.path} are not divisible by {size}")
        if tp > 1 and not sp:
            raise UsageError(
                f"--tp {tp} without --sp: Megatron trains routed experts, which {self.path} has, over tensor-parallel "
                "ranks with sequence parallelism alone; add --sp, or use --tp 1"
            )


def _is_linear(module: str) -> bool:
    try:
        megatron_name(module)
    except KeyError:
        return False
    return True


def _stored_shapes(checkpoint: BaseCheckpoint) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every weight, experts one by one, whichever way the files hold them."""
    stacks = {place.tensor for place in checkpoint.stacks.values()}
    shapes = {
        checkpoint.canonical(name): tuple(weight.shape)
        for name, weight in checkpoint.weights.items()
        if name not in stacks
    }
    return shapes | {f"{checkpoint.canonical(name)}.weight": place.shape for name, place in checkpoint.stacks.items()}


def _refuse_unsupported(config: dict, config_file: Path, architecture: str) -> None:
    # Qwen2 has its q, k, v bias always and no o_proj bias; for the others attention_bias adds one to o_proj too.
    for key, supported in (
        ("hidden_act", "silu"),
        ("use_sliding_window", False),
        ("mlp_bias", False),
        ("attention_bias", False),
    ):
        if key == "attention_bias" and architecture == "Qwen2ForCausalLM":
            continue
        if config.get(key, supported) != supported:
            raise ValueError(f"{config_file}: {key} = {config[key]!r:.80} is not supported, only {supported!r}")
    refuse_quantised(config.get("quantization_config"), config_file)


def _rope(config: dict, config_file: Path) -> tuple[float, dict | None]:
    """Base and llama3 scaling, from transformers 5's ``rope_parameters`` or the older pair of keys."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ValueError(f"{config_file}: rope parameters are {scaling!r:.80}, expected an object")
    read = Sizes(scaling | {"rope_theta": scaling.get("rope_theta", config.get("rope_theta"))}, config_file)
    theta = read.number("rope_theta", 10000.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if kind != "llama3" or any(key not in scaling for key in keys):
        raise ValueError(f"{config_file}: rope type {kind!r:.80} is not supported, only 'default' and 'llama3'")
    for key in keys:
        read.number(key)
    return theta, {key: scaling[key] for key in keys}


def _rotary_share(config: dict, config_file: Path) -> float:
    rope = config.get("rope_parameters") or {}
    read = Sizes({"partial_rotary_factor": config.get("partial_rotary_factor")} | rope, config_file)
    return read.number("partial_rotary_factor", 0.25)  # transformers' default of these families


def _listed(names, limit: int = 4) -> str:
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "none") + more
