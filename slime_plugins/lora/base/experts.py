"""A decoder whose every MLP is routed experts: its sizes, for counting alone. No Megatron."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from slime_plugins.lora.base.decoder import HFBase, _Sizes
from slime_plugins.lora.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ExpertsBase(HFBase):
    """As ``HFBase``. Routed experts are stacked in ``shapes``: ``mlp.experts.gate_proj.weight`` [E, O, I]."""

    architectures: ClassVar[dict[str, tuple[bool, bool]]] = {"Qwen3MoeForCausalLM": (False, True)}

    experts: int
    experts_per_token: int
    expert_ffn: int

    @classmethod
    def _more(cls, read: _Sizes) -> dict[str, Any]:
        for key, supported in (("decoder_sparse_step", 1), ("mlp_only_layers", [])):
            if read.config.get(key, supported) != supported:
                raise ValueError(f"{read.file}: {key} = {read.config[key]!r:.80} is not supported, only {supported!r}")
        key = (
            "num_local_experts" if "num_local_experts" in read.config else "num_experts"
        )  # transformers 5, and before
        experts = read.size(key)
        return {
            "experts": experts,
            "experts_per_token": read.size("num_experts_per_tok", most=experts),
            "expert_ffn": read.size("moe_intermediate_size"),
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for name, shape in super().shapes().items():
            layer, mlp, leaf = name.partition(".mlp.")
            if not mlp:
                found[name] = shape
                continue
            sizes = (self.hidden, self.expert_ffn)
            found[f"{layer}.mlp.gate.weight"] = (self.experts, self.hidden)
            found[f"{layer}.mlp.experts.{leaf}"] = (self.experts, *(sizes if leaf.startswith("down") else sizes[::-1]))
        return found

    def check_experts(self, *, ep: int, etp: int) -> None:
        """Raise UsageError for experts that do not split this way."""
        if self.experts % ep:
            raise UsageError(f"--ep {ep}: {self.experts} experts of {self.path} are not divisible by {ep}")
        if self.expert_ffn % etp:
            raise UsageError(f"--etp {etp}: {self.expert_ffn} channels of an expert are not divisible by {etp}")
