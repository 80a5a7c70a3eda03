"""Context parallelism where no TransformerEngine is: which tokens a rank has, and an attention that sees the others'.

Megatron's rotary positions decide it: of 2 CP equal pieces of the sequence, rank r has pieces r and 2 CP - 1 - r.
"""

from __future__ import annotations

import moe_models
import torch
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from slime_plugins.lora.rehearsal.model import local_layer_spec


def positions(length: int, rank: int | None = None) -> torch.Tensor:
    """Of a rank's tokens in a sequence of ``length``, int64, in its order; this rank's by default."""
    size = mpu.get_context_parallel_world_size()
    if size == 1:
        return torch.arange(length)
    rank = mpu.get_context_parallel_rank() if rank is None else rank
    pieces = torch.arange(length).reshape(2 * size, -1)
    return torch.cat((pieces[rank], pieces[2 * size - 1 - rank]))


class Attention(moe_models.Attention):
    """Causal attention of this rank's tokens over those of all ranks."""

    def forward(self, query, key, value, attention_mask, **_ignored):
        """[s, b, heads, d] each -> [s, b, heads * d]."""
        group, repeat = mpu.get_context_parallel_group(), query.shape[2] // key.shape[2]
        length = len(query) * group.size()
        in_order = torch.cat([positions(length, rank) for rank in range(group.size())]).argsort()
        key, value = (gather_from_sequence_parallel_region(x, group=group)[in_order] for x in (key, value))
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, *(x.repeat_interleave(repeat, 2) for x in (key, value))))
        later = torch.arange(length) > positions(length)[:, None]
        # As transformers' eager attention adds up: another order is worth 1e-6 of the gradient after a few steps.
        scores = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(later, -torch.inf)
        return (scores.softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2)


def spec(base, config):
    """A decoder layer of Megatron's own linears with this attention."""
    layer = local_layer_spec(base, config)
    layer.submodules.self_attention.submodules.core_attention = Attention
    return layer
