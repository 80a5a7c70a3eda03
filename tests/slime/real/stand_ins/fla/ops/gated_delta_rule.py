"""The gated delta rule, token by token in fp32 (Yang et al. 2024, arXiv:2412.06464, equation 10).

transformers 5 takes this package for the real one where it is on the path, so it is not asked for its own.
"""

from __future__ import annotations

import torch


def chunk_gated_delta_rule(
    query, key, value, *, g, beta, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel, cu_seqlens
):
    """[1, tokens, heads, dim] each, g and beta [1, tokens, heads] -> like value, and no state."""
    assert initial_state is None and not output_final_state and use_qk_l2norm_in_kernel and query.shape[0] == 1
    q, k = (_unit(tensor[0].float()) for tensor in (query, key))
    q, v = q * q.shape[-1] ** -0.5, value[0].float()
    outputs = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()):
        state = q.new_zeros(q.shape[1], q.shape[2], v.shape[2])
        for t in range(start, end):
            state = state * g[0, t].float().exp()[:, None, None]
            error = v[t] - torch.einsum("hkv,hk->hv", state, k[t])
            state = state + torch.einsum("hk,hv->hkv", k[t], error * beta[0, t].float()[:, None])
            outputs.append(torch.einsum("hkv,hk->hv", state, q[t]))
    outputs += [torch.zeros_like(v[0])] * (v.shape[0] - len(outputs))
    return torch.stack(outputs)[None].to(value.dtype), None


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
