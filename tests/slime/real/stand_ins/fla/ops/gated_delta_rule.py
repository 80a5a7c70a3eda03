"""transformers' delta rule, sequence by sequence."""

from __future__ import annotations

import torch


def chunk_gated_delta_rule(
    query, key, value, *, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens
):
    """[1, tokens, heads, dim] each, g and beta [1, tokens, heads] -> like value, and no state."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    assert initial_state is None and not output_final_state and use_qk_l2norm_in_kernel
    parts = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()):
        one = (tensor[:, start:end] for tensor in (query, key, value))
        parts.append(
            torch_chunk_gated_delta_rule(
                *one, g=g[:, start:end], beta=beta[:, start:end], use_qk_l2norm_in_kernel=True,
                initial_state=None, output_final_state=False,
            )[0]
        )  # fmt: skip
    rest = torch.zeros_like(value[:, int(cu_seqlens[-1]) :])
    return torch.cat([*parts, rest], 1), None
