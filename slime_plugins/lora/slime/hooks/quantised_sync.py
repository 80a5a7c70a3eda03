"""``sync_lost`` of engines that run a quantised copy: what slime's own quantiser leaves of the adapter's update.

With W the base, D the update and q what slime sends, ``lost`` is |(q(W + D) - q(W)) - D| / |D| (Frobenius norms, over
the sample together): 0 where all of D arrives, 1 where the engines are as far from the trained policy as the base is.
Rounding may move them further than that: a weight jumps by a whole step or not at all, and a block whose largest
weight changes gets another scale. So small updates have values well above 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from slime_plugins.lora.slime.hooks.engine_scheme import Scheme

ROWS = 4096
"""Rows that are in float32 at a time."""
PAIRED = ("linear_q_down_proj.", "linear_kv_down_proj.")
"""Latent attention with q-LoRA: slime keeps one of them back until the other comes, so they are not sent twice."""

_Parameter = TypeVar("_Parameter")


@dataclass
class Loss:
    """Sums over the sample; they stay on its device until they are asked for."""

    scheme: Scheme
    error: float | torch.Tensor = 0.0
    """Of squares of what the engines' weights are off the update."""
    update: float | torch.Tensor = 0.0
    """Of squares of the update."""
    matrices: int = 0
    taken: bool = False
    """Has it been measured, or tried?"""

    def add(
        self,
        sent: Mapping[str, torch.Tensor],
        base: Mapping[str, torch.Tensor],
        name: str,
        update: torch.Tensor,
    ) -> None:
        """Count one Hugging Face weight.

        Args:
            sent: what slime makes of W + D for the engines, by name.
            base: the same of W.
            name: of the weight, ending in ``.weight``.
            update: D [O, I], in any float dtype.
        Raises:
            ValueError: a form that is not known.
        """
        if update.ndim != 2:
            raise ValueError(f"{name} has {update.ndim} dimensions, expected 2")
        step = ROWS if self.scheme.block is None else -(-ROWS // self.scheme.block[0]) * self.scheme.block[0]
        for start in range(0, update.shape[0], step):
            rows = slice(start, min(start + step, update.shape[0]))
            wanted = update[rows].float()
            error = dequantised(self.scheme, sent, name, rows)
            error.sub_(dequantised(self.scheme, base, name, rows)).sub_(wanted)
            self.error = self.error + error.square().sum(dtype=torch.float64)
            self.update = self.update + wanted.square().sum(dtype=torch.float64)
        self.matrices += 1


def sample(named: Iterable[tuple[str, _Parameter]]) -> list[tuple[str, _Parameter]]:
    """Two weights of every kind on this pipeline stage, at a quarter and three quarters; the same in every sync.

    Args:
        named: slime's names of adapted weights, in its order, which is that of the layers.
    """
    kinds: dict[str, list[tuple[str, _Parameter]]] = {}
    for name, parameter in named:
        if any(paired in name for paired in PAIRED):
            continue
        kind = ".".join(word for word in name.split(".") if not word.isdecimal())
        if ".experts." in name:
            kind = kind.rstrip("0123456789")  # weight0 to weightN, one per expert
        kinds.setdefault(kind, []).append((name, parameter))
    places = ((found, {len(found) // 4, 3 * len(found) // 4}) for found in kinds.values())
    return [found[place] for found, chosen in places for place in sorted(chosen)]


def compare(
    loss: Loss, convert: Callable[[torch.Tensor, Any], list], quantization: Any, whole: Callable[[int], torch.Tensor]
) -> None:
    """Count one Megatron weight.

    Args:
        convert: slime's ``convert_to_hf`` of a tensor by a ``quantization_config``; None only names and splits.
        whole: gathers W (0), W + D (1) or D (2) from all shards, one at a time.
    Raises:
        ValueError: slime made something of it that is not known.
    """
    base, sent = (dict(convert(whole(which), quantization)) for which in (0, 1))
    for name, update in convert(whole(2), None):
        loss.add(sent, base, name, update)


def dequantised(scheme: Scheme, sent: Mapping[str, torch.Tensor], name: str, rows: slice) -> torch.Tensor:
    """What an engine multiplies with, float32 [rows, I] in new memory, by the definition of the scheme.

    Args:
        sent: what slime sends for a weight, by name; a weight that it leaves dense is read as it is.
        rows: start at a multiple of the block's rows.
    Raises:
        ValueError: a form that is not known.
    """
    stem = name.removesuffix(".weight")
    if scheme.form == "int4" and f"{stem}.weight_packed" in sent:
        return _int4(sent[f"{stem}.weight_packed"][rows], sent[f"{stem}.weight_scale"][rows])
    if name not in sent:
        raise ValueError(f"slime made {', '.join(sorted(sent)) or 'nothing'} of {name}, which is no {scheme}")
    weight = sent[name][rows]
    if weight.dtype in (torch.bfloat16, torch.float16, torch.float32):
        return weight.to(torch.float32, copy=True)
    if scheme.form != "fp8" or weight.dtype != torch.float8_e4m3fn:
        raise ValueError(f"slime made {weight.dtype} of {name}, which is no {scheme}")
    return weight.float().mul_(_fp8_scales(scheme, sent, stem, rows, weight.shape[1]))


def _fp8_scales(
    scheme: Scheme, sent: Mapping[str, torch.Tensor], stem: str, rows: slice, columns: int
) -> torch.Tensor:
    """Factors that broadcast over [rows, I]."""
    key = f"{stem}.weight_scale" if scheme.block is None else f"{stem}.weight_scale_inv"
    if key not in sent:
        raise ValueError(f"slime made {', '.join(sorted(sent))} of {stem}, without {key}, which is no {scheme}")
    scale = sent[key]
    if scheme.block is None:
        return scale.float()
    height, width = scheme.block
    if scale.dtype == torch.int32:
        # DeepGEMM's UE8M0, one row of scales per row of weights: four exponents of two in an int32, the first lowest.
        exponents = scale[rows].contiguous().view(torch.uint8).to(torch.int32)
        return (exponents << 23).view(torch.float32).repeat_interleave(width, 1)[:, :columns]
    blocks = scale[rows.start // height : -(-rows.stop // height)].float()
    return blocks.repeat_interleave(height, 0)[: rows.stop - rows.start].repeat_interleave(width, 1)[:, :columns]


def _int4(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Eight values in an int32, the first in the lowest bits, each plus 8; a scale per group of a row."""
    shifts = torch.arange(0, 32, 4, device=packed.device, dtype=torch.int32)
    values = ((packed.unsqueeze(-1) >> shifts) & 15).flatten(1) - 8
    groups = scale.shape[1]
    return (values.float().unflatten(1, (groups, -1)) * scale.float().unsqueeze(-1)).flatten(1)


def said(scheme: Scheme, lost: float) -> str:
    """What a user has to know of a loss: how much, by what, and the way out."""
    return (
        f"train/lora/sync_lost is {lost:.2f} after slime's quantiser ({scheme}): the engines' weights are off the "
        f"adapter's update by {lost:.2f} of its norm, where 1 is as far off as the base; if it stays so, use "
        "--lora-sync adapter, which serves the adapter unquantised beside the quantised base and has no such loss"
    )
