"""Linear attention in Megatron as slime has it: transformers' module, whole on every tensor-parallel rank.

Every rank computes all of it on all tokens. Under sequence parallelism the tokens are gathered before it and each rank
takes its own back, and neither backward sums: all ranks have the same gradient.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.module import MegatronModule

_NETS = {
    "qwen3_next": ("qwen3_next.modeling_qwen3_next", "Qwen3NextGatedDeltaNet"),
    "qwen3_5_text": ("qwen3_5.modeling_qwen3_5", "Qwen3_5GatedDeltaNet"),
    "qwen3_5_moe_text": ("qwen3_5_moe.modeling_qwen3_5_moe", "Qwen3_5MoeGatedDeltaNet"),
}
"""model_type -> module and class in transformers. What computes it, there as in the rollouts, is transformers' choice:
its kernels where they are installed, else torch."""


class LinearAttention(MegatronModule):
    """In place of a layer's self-attention."""

    def __init__(self, config, layer_number: int, *, hf_dir: Path, **_ignored):
        super().__init__(config=config)
        from transformers import AutoConfig

        hf = AutoConfig.from_pretrained(hf_dir).get_text_config()
        module, name = _NETS[hf.model_type]
        net: Any = getattr(importlib.import_module(f"transformers.models.{module}"), name)
        self.linear_attn = net(hf, layer_number - 1).to(config.params_dtype)

    def forward(self, hidden_states: torch.Tensor, attention_mask=None, **_ignored):
        """[s, b, h] of this rank's tokens -> the same, and no bias. Tokens to the right never count: no mask."""
        group = parallel_state.get_tensor_model_parallel_group()
        if self.config.sequence_parallel:
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=group
            )
        output = self.linear_attn(hidden_states.transpose(0, 1)).transpose(0, 1)
        if self.config.sequence_parallel:
            output = tensor_parallel.scatter_to_sequence_parallel_region(output, group=group)
        return output.contiguous(), None
