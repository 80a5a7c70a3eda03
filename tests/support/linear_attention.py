"""Linear attention as slime has it on TransformerEngine's layers: the norm is in it. The rest is the rehearsal's."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from slime_plugins.lora.rehearsal import linear_attention


class LinearAttention(linear_attention.LinearAttention):
    """``norm``: the layer's own, where the layer itself has none (TE)."""

    def __init__(self, config, layer_number: int, *, hf_dir, norm: bool, **_ignored):
        super().__init__(config, layer_number, hf_dir=hf_dir)
        if norm:
            from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

            self.input_layernorm = Qwen3NextRMSNorm(config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, hidden_states: torch.Tensor, attention_mask=None, **_ignored):
        if hasattr(self, "input_layernorm"):
            hidden_states = self.input_layernorm(hidden_states)
        return super().forward(hidden_states)


def is_linear(hf_dir) -> list[bool]:
    """Of every layer: has it linear attention?"""
    config = json.loads(Path(hf_dir, "config.json").read_text())
    kinds = (config.get("text_config") or config).get("layer_types") or []
    return [kind == "linear_attention" for kind in kinds]
