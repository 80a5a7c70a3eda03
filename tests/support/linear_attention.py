"""Linear attention as slime has it in Megatron: a module of Hugging Face's, whole on every tensor-parallel rank.

transformers computes it; around it are slime's norm, its gather of the tokens, and its scatter, whose backwards do
not sum.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.module import MegatronModule


class LinearAttention(MegatronModule):
    """In place of a layer's self-attention. ``norm``: the layer's own, where the layer itself has none (TE)."""

    def __init__(self, config, layer_number: int, *, hf_dir, norm: bool, **_ignored):
        super().__init__(config=config)
        hf = text_config(hf_dir)
        self.linear_attn = gated_delta_net(hf, layer_number - 1)
        if norm:
            from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

            self.input_layernorm = Qwen3NextRMSNorm(hf.hidden_size, eps=hf.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, attention_mask=None, **_ignored):
        """[s, b, h] of this rank's tokens -> the same, and no bias."""
        group = parallel_state.get_tensor_model_parallel_group()
        if self.config.sequence_parallel:
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=group
            )
        hidden_states = hidden_states.transpose(0, 1)
        if hasattr(self, "input_layernorm"):
            hidden_states = self.input_layernorm(hidden_states)
        output = self.linear_attn(hidden_states).transpose(0, 1)
        if self.config.sequence_parallel:
            output = tensor_parallel.scatter_to_sequence_parallel_region(output, group=group)
        return output.contiguous(), None


def text_config(hf_dir):
    """transformers' config of the language model."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(hf_dir)
    return getattr(config, "text_config", config)


def gated_delta_net(config, layer: int) -> torch.nn.Module:
    """transformers' own, without a kernel of its own."""
    if config.model_type == "qwen3_next":
        from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet as Net
    elif config.model_type == "qwen3_5_text":
        from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet as Net
    else:
        from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeGatedDeltaNet as Net
    return Net(config, layer)


def is_linear(hf_dir) -> list[bool]:
    """Of every layer: has it linear attention?"""
    config = json.loads(Path(hf_dir, "config.json").read_text())
    kinds = (config.get("text_config") or config).get("layer_types") or []
    return [kind == "linear_attention" for kind in kinds]
