"""A causal convolution and a gated norm over packed sequences."""

from __future__ import annotations

import torch


class ShortConvolution(torch.nn.Conv1d):
    """Depthwise, causal, then SiLU. Weight [channels, 1, kernel]."""

    def __init__(self, hidden_size: int, kernel_size: int, bias: bool):
        super().__init__(hidden_size, hidden_size, kernel_size, groups=hidden_size, bias=bias, padding=kernel_size - 1)

    def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor):
        """x [1, tokens, channels], sequences end to end -> the same, and no cache."""
        parts = []
        for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()):
            one = super().forward(x[:, start:end].transpose(1, 2))[..., : end - start]
            parts.append(torch.nn.functional.silu(one).transpose(1, 2))
        return torch.cat([*parts, torch.zeros_like(x[:, int(cu_seqlens[-1]) :])], 1), None


class FusedRMSNormGated(torch.nn.Module):
    """norm(x) * weight * silu(gate)."""

    def __init__(self, hidden_size: int, eps: float, activation: str, device, dtype):
        super().__init__()
        assert activation == "silu"
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=dtype))

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * normed.to(x.dtype) * torch.nn.functional.silu(gate.float())).to(x.dtype)
