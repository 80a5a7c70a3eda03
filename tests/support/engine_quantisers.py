"""How engines' weights are quantised and read again, written from the schemes' definitions: one block at a time.

Strict: a shape, dtype or block that a scheme does not have is an error.
"""

from __future__ import annotations

import torch

FP8_MAX = 448.0
"""Of e4m3."""
CONFIGS = {
    "fp8 blocks": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 32]},
    "fp8 tensor": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "int4": {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "symmetric": True, "group_size": 16}}},
    },
}
"""``quantization_config`` as a Hugging Face checkpoint has it."""


def quantise(name: str, weight: torch.Tensor, config: dict) -> list[tuple[str, torch.Tensor]]:
    """What slime's quantiser returns for one weight: names and tensors."""
    assert weight.ndim == 2 and name.endswith(".weight"), name
    stem = name.removesuffix(".weight")
    if config["quant_method"] == "compressed-tensors":
        packed, scale = int4(weight, config["config_groups"]["group_0"]["weights"]["group_size"])
        return [(f"{stem}.weight_packed", packed), (f"{stem}.weight_scale", scale)]
    block = config.get("weight_block_size")
    codes, scale = fp8(weight, tuple(block) if block else tuple(weight.shape))
    if block:
        return [(name, codes), (f"{stem}.weight_scale_inv", scale)]
    return [(name, codes), (f"{stem}.weight_scale", scale.view(1))]


def fp8(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 codes [O, I], and float32 scales, one per block: its largest absolute value is the largest code."""
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    rows, columns = (range(0, size, step) for size, step in zip(weight.shape, block))
    scales = torch.empty(len(rows), len(columns))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            part = weight[row : row + block[0], column : column + block[1]].float()
            scales[i, j] = part.abs().max().clamp(min=1e-10) / FP8_MAX
            codes[row : row + block[0], column : column + block[1]] = (part / scales[i, j]).clamp(-FP8_MAX, FP8_MAX)
    return codes, scales


def int4(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 [O, I/8] of values plus 8, the first in the lowest bits; a scale per group in the weight's dtype."""
    assert weight.shape[1] % group == 0 and group % 8 == 0, (weight.shape, group)
    parts = weight.float().unflatten(1, (-1, group))
    scale = (parts.abs().amax(2) / 7).clamp(min=1e-5).to(weight.dtype)
    values = (parts / scale.float().unsqueeze(2)).round().clamp(-7, 7).flatten(1).long() + 8
    packed = torch.zeros(weight.shape[0], weight.shape[1] // 8, dtype=torch.int64)
    for place in range(8):
        packed += values[:, place::8] * 16**place
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32), scale


def ue8m0(scales: torch.Tensor, height: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales rounded up to powers of two, and as DeepGEMM packs them: int32 [rows, blocks/4], the first lowest."""
    exponents = scales.log2().ceil().to(torch.int64)
    lines = exponents.repeat_interleave(height, 0)[:rows] + 127
    lines = torch.nn.functional.pad(lines, (0, -lines.shape[1] % 4))
    packed = sum(lines[:, place::4] * 256**place for place in range(4))
    return 2.0**exponents, torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def dequantise(sent: dict[str, torch.Tensor], config: dict) -> torch.Tensor:
    """float32 [O, I] of what ``quantise`` made of one weight, value by value."""
    by_kind = {name.rsplit(".", 1)[1]: tensor for name, tensor in sent.items()}
    if config["quant_method"] == "compressed-tensors":
        packed, scale = by_kind["weight_packed"].tolist(), by_kind["weight_scale"].float()
        group = config["config_groups"]["group_0"]["weights"]["group_size"]
        values = [[(word % 2**32) // 16**place % 16 - 8 for word in row for place in range(8)] for row in packed]
        return torch.tensor(values).float() * scale.repeat_interleave(group, 1)
    dense = by_kind["weight"].float()
    block = config.get("weight_block_size")
    if not block:
        return dense * by_kind["weight_scale"]
    scales = by_kind["weight_scale_inv"]
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            dense[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]] *= scales[i, j]
    return dense


def lost(weights, config: dict) -> float:
    """|(q(W + D) - q(W)) - D| / |D| over (W, W + D, D), each dequantised."""
    error = update = 0.0
    for base, merged, change in weights:
        read = [dequantise(dict(quantise("x.weight", w, config)), config).double() for w in (base, merged)]
        error += (read[1] - read[0] - change.double()).square().sum().item()
        update += change.double().square().sum().item()
    return (error / update) ** 0.5
