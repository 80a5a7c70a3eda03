"""What the engine's quantisation (FP8, INT4) leaves of a merged update: measured with slime's own quantiser.

slime gathers a merged weight, gives it Hugging Face's names and puts it through ``quantize_params``. Here that very
function quantises W and W + D of a few linears, this rank's shard of each, and what it makes is read back by the
scheme's own definition:

    lost = |(deq(q(W + D)) - deq(q(W))) - D| / |D|        0: the engine has the update; 1: as far off as without it

Shards are quantised by themselves, so that no rank waits for another. Blocks and groups of a shard are those of the
whole matrix wherever SGLang can cut it; a scale per tensor is the shard's own, which is the whole's or finer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from slime_plugins.lora.layers import LoRALinear
from slime_plugins.lora.names import hf_names, of_expert

Named = list[tuple[str, torch.Tensor]]
Quantise = Callable[[str, Named], Named]
"""Megatron's name of a parameter and its tensors in Hugging Face's names -> the tensors that an engine gets."""

SAMPLED = 8
"""Base parameters per rank that are quantised twice in a sync, the same in every one."""
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which four bits of a word of zero points are whose, in slime's packing."""


def quantiser_of(args: Any, config: Mapping[str, Any] | None) -> Quantise | None:
    """slime's, for the ``quantization_config`` of the engine's checkpoint; None where slime sends weights as they are.

    slime knows these methods and passes others on (``quantize_params``).
    """
    if not config or config.get("quant_method") not in ("fp8", "compressed-tensors"):
        return None

    def quantise(megatron_name: str, named: Named) -> Named:
        from slime.backends.megatron_utils.megatron_to_hf.processors import quantize_params

        return quantize_params(args, megatron_name, named, config)

    return quantise


@dataclass
class EngineRounding:
    """Adds up what the engine's form of the weights loses, over the sampled parameters of one sync."""

    quantise: Quantise
    config: Mapping[str, Any]
    sampled: frozenset[int]
    """``id`` of base parameters."""
    update: float | torch.Tensor = 0.0
    """Sum of squares of D."""
    lost: float | torch.Tensor = 0.0
    """Sum of squares of what is missing of D, or has come to it."""

    @classmethod
    def of(
        cls, args: Any, config: Mapping[str, Any] | None, adapted: Mapping[int, tuple[Any, int]]
    ) -> EngineRounding | None:
        """For these adapted parameters (``merged_sync.Adapted``); None where slime does not quantise."""
        quantise = quantiser_of(args, config)
        if quantise is None or config is None:
            return None
        linears = [key for key, (linear, _) in adapted.items() if isinstance(linear, LoRALinear)]
        return cls(quantise, config, frozenset(linears[:: max(1, -(-len(linears) // SAMPLED))]))

    def add(self, name: str, linear: LoRALinear, index: int, weight: torch.Tensor, merged: torch.Tensor) -> None:
        """Measure one parameter of this rank, once per projection.

        Args:
            name: that slime's updater has for it, ``module.module.decoder.layers.3.mlp.linear_fc1.weight``.
            weight: W, dense, [O, I].
            merged: W + D in its dtype.
        """
        if weight.ndim != 2 or not self._cuts_whole_groups(weight.shape[1]):
            return
        update, spec = linear.lora_update(index), linear.lora
        full = spec.name if spec.experts is None else of_expert(spec.name, spec.experts[index])
        leaves = {hf.rpartition(".")[2]: hf for hf in hf_names(full)}
        for part in spec.parts:
            D, hf = part.take(update), f"{leaves[part.name]}.weight"
            before, after = (
                dequantised(self.quantise(name, [(hf, part.take(W))]), hf, self.config) for W in (weight, merged)
            )
            self.update = self.update + D.square().sum(dtype=torch.float64)
            self.lost = self.lost + (after - before - D).square().sum(dtype=torch.float64)

    def _cuts_whole_groups(self, columns: int) -> bool:
        """slime's INT4 quantiser takes whole groups alone; a shard of a row-parallel linear may end within one."""
        return self.config["quant_method"] != "compressed-tensors" or columns % _int4(self.config)["group_size"] == 0


def dequantised(named: Sequence[tuple[str, torch.Tensor]], name: str, config: Mapping[str, Any]) -> torch.Tensor:
    """float32 [O, I] that an engine multiplies with, out of what slime sends for the weight ``name``.

    FP8: value times the scale of its block, or of the tensor. INT4, eight to a word: (value - zero) times the scale of
    its group, zero 8 where the scheme is symmetric. A weight that is sent as it is stays as it is.

    Raises:
        ValueError: tensors of another form (scales packed for a kernel), naming them.
    """
    found = {key.removeprefix(name.removesuffix("weight")): tensor for key, tensor in named}
    weight, tensors = found.get("weight"), {key: tensor for key, tensor in found.items() if key != "weight"}
    if weight is not None and not tensors:
        return weight.float()
    block = tensors.get("weight_scale_inv")
    if weight is not None and block is not None and block.is_floating_point():
        rows, columns = config["weight_block_size"]
        scale = block.float().repeat_interleave(rows, 0)[: weight.shape[0]]
        return weight.float() * scale.repeat_interleave(columns, 1)[:, : weight.shape[1]]
    if weight is not None and tensors.keys() == {"weight_scale"}:
        return weight.float() * tensors["weight_scale"].float()
    if "weight_packed" in tensors and "weight_scale" in tensors:
        return _from_int4(tensors, _int4(config))
    raise ValueError(
        f"{name}: slime sends {', '.join(found)}, a form of quantised weights that is not read here; sync_lost_engine "
        "is not measured"
    )


def _int4(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config["config_groups"]["group_0"]["weights"]


def _from_int4(tensors: Mapping[str, torch.Tensor], scheme: Mapping[str, Any]) -> torch.Tensor:
    values = _unpacked(tensors["weight_packed"], range(8)).float()  # [O, I]
    scale = tensors["weight_scale"].float()  # [O, groups]
    zeros = torch.tensor(8.0, device=values.device)
    if not scheme["symmetric"]:
        of_groups = _unpacked(tensors["weight_zero_point"], _AWQ_ORDER).t().float()
        zeros = of_groups.repeat_interleave(scheme["group_size"], 1)
    return (values - zeros) * scale.repeat_interleave(scheme["group_size"], 1)


def _unpacked(words: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """int32 [R, C] -> its unsigned four-bit values, [R, 8 C]; value i of a word is its ``order[i]``-th four bits."""
    shifts = torch.tensor(list(order), device=words.device, dtype=torch.int32) * 4
    return ((words[..., None] >> shifts) & 15).flatten(-2)
