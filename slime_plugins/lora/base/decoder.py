"""A dense decoder as Hugging Face stores it: its sizes, and the tensors it must have. No Megatron.

Everything that can be wrong with a directory is found from the config and the file headers, without torch, before any
process starts.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.errors import UsageError

# architecture -> (bias on q, k, v; RMSNorm on each q and k head)
ARCHITECTURES = {
    "LlamaForCausalLM": (False, False),
    "Qwen2ForCausalLM": (True, False),
    "Qwen3ForCausalLM": (False, True),
}
_LARGEST = 2**31 - 1
"""Of any size in a config."""
MOST_LAYERS = 10_000
"""Every layer has its names written out."""


@dataclass(frozen=True, kw_only=True)
class HFBase:
    """A dense decoder of a supported family, as its ``config.json`` describes it."""

    path: Path
    architecture: str
    num_layers: int
    hidden: int
    ffn: int
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

    @property
    def qkv_bias(self) -> bool:
        return ARCHITECTURES[self.architecture][0]

    @property
    def qk_norm(self) -> bool:
        return ARCHITECTURES[self.architecture][1]

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
        base._check_tensors({name: weight.shape for name, weight in checkpoint.weights.items()})
        return base

    @classmethod
    def _from_config(cls, config: Any, path: Path) -> HFBase:
        config_file = path / "config.json"
        if not isinstance(config, dict):
            raise ValueError(f"{config_file}: expected a JSON object, got {type(config).__name__}")
        named = config.get("architectures")
        architecture = named[0] if isinstance(named, list) and named else None
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(f"{config_file}: architecture {architecture!s:.80} is not supported, only {known}")
        _refuse_unsupported(config, config_file, architecture)
        theta, llama3_rope = _rope(config, config_file)
        read = Sizes(config, config_file)
        hidden, num_heads = read.size("hidden_size"), read.size("num_attention_heads")
        return cls(
            path=path,
            architecture=architecture,
            num_layers=read.size("num_hidden_layers", most=MOST_LAYERS),
            hidden=hidden,
            ffn=read.size("intermediate_size"),
            num_heads=num_heads,
            num_query_groups=read.size("num_key_value_heads", num_heads),
            head_dim=read.size("head_dim", max(hidden // num_heads, 1)),
            vocab_size=read.size("vocab_size"),
            norm_eps=read.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            llama3_rope=llama3_rope,
            tied=read.flag("tie_word_embeddings"),
            max_positions=read.size("max_position_embeddings", 4096),
        )

    def _check_tensors(self, shapes: dict[str, tuple[int, ...]]) -> None:
        expected = self.shapes()
        # A tied head may be stored all the same, and old checkpoints carry rotary buffers: transformers drops both.
        found = {name for name in shapes if not name.endswith("rotary_emb.inv_freq")}
        found -= {"lm_head.weight"} if self.tied else set()
        if found != expected.keys():
            raise ValueError(
                f"{self.path}: tensors do not fit {self.architecture} with {self.num_layers} layers; "
                f"missing: {_listed(expected.keys() - found)}; unexpected: {_listed(found - expected.keys())}"
            )
        for name, shape in expected.items():
            if shapes[name] != shape:
                raise ValueError(f"{self.path}: {name} has shape {list(shapes[name])}, config.json says {list(shape)}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor that the checkpoint must hold."""
        q_rows, kv_rows = self.num_heads * self.head_dim, self.num_query_groups * self.head_dim
        shapes = {"model.embed_tokens.weight": (self.vocab_size, self.hidden), "model.norm.weight": (self.hidden,)}
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden)
        layer = {
            "input_layernorm.weight": (self.hidden,),
            "post_attention_layernorm.weight": (self.hidden,),
            "self_attn.q_proj.weight": (q_rows, self.hidden),
            "self_attn.k_proj.weight": (kv_rows, self.hidden),
            "self_attn.v_proj.weight": (kv_rows, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, q_rows),
            "mlp.gate_proj.weight": (self.ffn, self.hidden),
            "mlp.up_proj.weight": (self.ffn, self.hidden),
            "mlp.down_proj.weight": (self.hidden, self.ffn),
        }
        if self.qkv_bias:
            layer |= {f"self_attn.{p}_proj.bias": (q_rows if p == "q" else kv_rows,) for p in "qkv"}
        if self.qk_norm:
            layer |= {f"self_attn.{p}_norm.weight": (self.head_dim,) for p in "qk"}
        for number in range(self.num_layers):
            shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
        return shapes

    def linears(self) -> list[str]:
        """Names of the linears inside layers, without ``.weight``."""
        return [
            name.removesuffix(".weight")
            for name, shape in self.shapes().items()
            if len(shape) == 2 and name.startswith("model.layers.")
        ]

    def check_parallel(self, *, tp: int, pp: int = 1, vpp: int | None = None) -> None:
        """Raise UsageError for a model that does not split this way."""
        for count, what in (
            (self.num_heads, "attention heads"),
            (self.num_query_groups, "key/value heads"),
            (self.ffn, "feed-forward channels"),
        ):
            if count % tp:
                raise UsageError(f"--tp {tp}: {count} {what} of {self.path} are not divisible by {tp}")
        stages = pp * (vpp or 1)
        if self.num_layers % stages:
            raise UsageError(
                f"--pp {pp}{f' --vpp {vpp}' if vpp else ''}: {self.num_layers} layers of {self.path} "
                f"are not divisible by {stages}"
            )


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


def refuse_quantised(quantization: Any, config_file: Path) -> None:
    """Of what a config says that weights are stored as, only bitsandbytes' NF4 is read (``base.coded``)."""
    if quantization is None:
        return
    told = quantization if isinstance(quantization, dict) else {}
    if told.get("quant_method") != "bitsandbytes" or not told.get("load_in_4bit"):
        raise ValueError(
            f"{config_file}: quantization_config = {quantization!r:.80} is not supported; give the dense checkpoint, "
            "or one in bitsandbytes' nf4"
        )
    form = told.get("bnb_4bit_quant_type")
    if form != "nf4":
        raise ValueError(
            f"{config_file}: bnb_4bit_quant_type is {form!r:.80}, and nf4 alone is read (QLoRA's form, and more exact "
            "at the same size); quantise the dense checkpoint with nf4, or give that"
        )


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


@dataclass(frozen=True)
class Sizes:
    """Reads numbers out of a config that may hold anything. Each raises ValueError naming file, key and value."""

    config: dict[str, Any]
    file: Path

    def size(self, key: str, default: int | None = None, *, most: int = _LARGEST) -> int:
        """A whole number of at least 1; null counts as absent."""
        value = self._value(key, default)
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{self.file}: {key} is {value!r:.80}, expected a whole number from 1 to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._value(key, default)
        whole = type(value) is int and 0 < value <= _LARGEST
        if not whole and not (isinstance(value, float) and math.isfinite(value) and value > 0):
            raise ValueError(f"{self.file}: {key} is {value!r:.80}, expected a number above 0")
        return value

    def flag(self, key: str) -> bool:
        value = self._value(key, False)
        if not isinstance(value, bool):
            raise ValueError(f"{self.file}: {key} is {value!r:.80}, expected true or false")
        return value

    def _value(self, key: str, default: Any) -> Any:
        value = self.config.get(key)
        if value is None and default is None:
            raise ValueError(f"{self.file}: key {key!r} is missing")
        return default if value is None else value


def _listed(names, limit: int = 4) -> str:
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "none") + more
