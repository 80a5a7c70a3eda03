"""Linear attention as a config describes it: which layers have it, and what such a layer holds. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from slime_plugins.lora.base.sizes import Sizes

_KINDS = ("linear_attention", "full_attention")


@dataclass(frozen=True, kw_only=True)
class LinearAttention:
    """Gated delta nets in place of the attention of some layers: Qwen3-Next, Qwen3.5."""

    layers: frozenset[int]
    shapes: Mapping[str, tuple[int, ...]]
    """Name in such a layer -> shape."""

    @classmethod
    def read(cls, read: Sizes, num_layers: int, *, fused: bool) -> LinearAttention:
        """From the keys of Qwen's configs.

        Args:
            fused: the input projections are two (Qwen3-Next), not four (Qwen3.5).
        """
        hidden = read.size("hidden_size")
        key_heads, value_heads = read.size("linear_num_key_heads"), read.size("linear_num_value_heads")
        keys = key_heads * read.size("linear_key_head_dim")
        value_dim = read.size("linear_value_head_dim")
        values = value_heads * value_dim
        if fused:
            rows = {"in_proj_qkvz": 2 * keys + 2 * values, "in_proj_ba": 2 * value_heads}
        else:
            rows = {"in_proj_qkv": 2 * keys + values, "in_proj_z": values}
            rows |= {"in_proj_a": value_heads, "in_proj_b": value_heads}
        shapes: dict[str, tuple[int, ...]] = {f"linear_attn.{name}.weight": (n, hidden) for name, n in rows.items()}
        shapes |= {
            "linear_attn.conv1d.weight": (2 * keys + values, 1, read.size("linear_conv_kernel_dim")),
            "linear_attn.A_log": (value_heads,),
            "linear_attn.dt_bias": (value_heads,),
            "linear_attn.norm.weight": (value_dim,),
            "linear_attn.out_proj.weight": (hidden, values),
        }
        return cls(layers=_layers(read, num_layers), shapes=shapes)


def _layers(read: Sizes, num_layers: int) -> frozenset[int]:
    kinds = read.config.get("layer_types")
    if kinds is None:
        step = read.size("full_attention_interval", 4)
        return frozenset(number for number in range(num_layers) if (number + 1) % step)
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in _KINDS for kind in kinds):
        raise ValueError(
            f"{read.file}: layer_types is {kinds!r:.80}, expected one of {' and '.join(_KINDS)} for each of "
            f"{num_layers} layers"
        )
    return frozenset(number for number, kind in enumerate(kinds) if kind == _KINDS[0])
