"""The linears that ``traffic.py`` counts: every kind, alone, frozen or with an adapter, in Megatron's DDP."""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any

import torch
from _harness import Setting

HIDDEN, HEADS, GROUPS, HEAD_DIM, FFN = 48, 4, 2, 20, 72
TOKENS, RANK, EXPERTS = 128, 4, 4
"""No two of the sizes that a tensor can have here are equal: a tensor's size says what it is."""
LINEARS = {
    "qkv": ("self_attention.linear_qkv", "column", HIDDEN, (HEADS + 2 * GROUPS) * HEAD_DIM),
    "proj": ("self_attention.linear_proj", "row", HEADS * HEAD_DIM, HIDDEN),
    "fc1": ("mlp.linear_fc1", "column", HIDDEN, 2 * FFN),
    "fc2": ("mlp.linear_fc2", "row", FFN, HIDDEN),
}
"""Short name -> path in a layer, how it is cut, input and output features of all ranks."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One linear of one implementation."""

    implementation: str
    """``local``, ``te``, ``experts`` (of a SequentialMLP), ``te experts``, ``peft``."""
    linear: str
    """A key of ``LINEARS``."""

    @property
    def of_experts(self) -> bool:
        return "experts" in self.implementation

    def ways(self, setting: Setting, layouts: list[str], bridge: bool) -> list[tuple[str, str]]:
        """Layout and way (``--lora-linears``, or whose) of its adapters.

        Bridge takes the gathered output of TransformerEngine's norms, which the stand-in has not.
        """
        if self.implementation == "peft":
            return [("fused", "peft")]
        ways = [(layout, way) for layout in layouts for way in (["taps"] if self.of_experts else ["fused", "taps"])]
        return ways + (
            [("fused", "bridge")]
            if bridge and not self.of_experts and (self.implementation == "local" or setting.tp == 1)
            else []
        )

    def widths(self, setting: Setting) -> dict[int, tuple[str, float]]:
        """Elements of a storage -> what it is. Experts see all tokens, and TP does not cut them here."""
        _, parallel, size_in, size_out = LINEARS[self.linear]
        tp = 1 if self.of_experts else setting.tp
        size_in, size_out = (
            size_in // (tp if parallel == "row" else 1),
            size_out // (tp if parallel == "column" else 1),
        )
        tokens = {TOKENS: 1.0} | ({TOKENS // tp: 1 / tp} if setting.sequence_parallel and tp > 1 else {})
        sizes = [
            (n * size, side, share)
            for n, share in tokens.items()
            for side, size in (("NI", size_in), ("NO", size_out))
        ]
        if self.linear == "fc2" and not self.of_experts:
            sizes.append((TOKENS * 2 * size_in, "NI", 2.0))  # what its SwiGLU takes
        found = {size: (side, share) for size, side, share in sizes}
        assert len(found) == len(sizes), "two sizes are equal"
        return found


def cases_of(setting: Setting) -> list[Case]:
    kinds = ["local", "te", *(["experts", "te experts", "peft"] if setting.tp == 1 else [])]
    return [
        Case(kind, linear)
        for kind in kinds
        for linear in LINEARS
        if linear.startswith("fc") or "experts" not in kind
        if linear == "proj" or kind != "peft"
    ]


class _Holder(torch.nn.Module):
    def __init__(self, linear: torch.nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, *args):
        return self.linear(*args)


def in_ddp(linear: torch.nn.Module) -> torch.nn.Module:
    """Under Megatron's DDP, which adds a gradient to ``main_grad``; a linear that does not train has none."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    holder = _Holder(linear)
    if not any(parameter.requires_grad for parameter in holder.parameters()):
        return holder
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    model = DistributedDataParallel(config_of(Setting(1, False)), ddp, holder)
    model.zero_grad_buffer()
    return model


def config_of(setting: Setting, **more: Any):
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=HEAD_DIM,
        ffn_hidden_size=FFN,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        tensor_model_parallel_size=setting.tp,
        sequence_parallel=setting.sequence_parallel,
        use_cpu_initialization=True,
        **more,
    )


def linear_of(case: Case, setting: Setting, layout: str | None, linears: str) -> torch.nn.Module:
    """The linear, frozen, with an adapter of some values if it has a layout."""
    path, parallel, size_in, size_out = LINEARS[case.linear]
    if case.implementation == "peft":
        return _peft_linear(size_in, size_out, layout)
    from slime_plugins.lora import LoRAConfig
    from slime_plugins.lora.layers import adapt, frozen_of, kind_of, spec_for

    linear, name = _build(case, setting, parallel, size_in, size_out), f"decoder.layers.0.{path}"
    linear.requires_grad_(False)
    if case.implementation == "experts":
        for one in linear.linears:
            one.requires_grad_(False)
    if layout is None:
        return linear
    if linears == "bridge":
        return _in_bridge(linear, name)
    if case.of_experts:
        name = name.replace("mlp.", "mlp.experts.")
    base, config = frozen_of(linear), LoRAConfig(rank=RANK, alpha=3 * RANK, layout=layout)
    from slime_plugins.lora.names import hf_names

    spec = spec_for(base, name, tuple(range(len(hf_names(name)))), config)
    adapted = adapt(linear, kind_of(linear).form, base, spec, None, linears)
    assert case.of_experts or (adapted.lora_fused is not None) == (linears == "fused"), adapted.lora_why_taps
    with torch.no_grad():
        adapted.lora_B.normal_()
    return adapted


def _build(case: Case, setting: Setting, parallel: str, size_in: int, size_out: int) -> torch.nn.Module:
    from megatron.core import parallel_state

    if case.of_experts:
        return _build_experts(case)
    config = config_of(setting)
    common = dict(config=config, init_method=config.init_method, bias=False, skip_bias_add=False)
    common |= dict(tp_group=parallel_state.get_tensor_model_parallel_group(), is_expert=False)
    common |= dict(gather_output=False) if parallel == "column" else dict(input_is_parallel=True)
    if case.implementation == "te":
        te = _transformer_engine()
        kinds = {"column": te.TELayerNormColumnParallelLinear, "row": te.TERowParallelLinear}
    else:
        from megatron.core.tensor_parallel import layers

        kinds = {"column": layers.ColumnParallelLinear, "row": layers.RowParallelLinear}
    return kinds[parallel](size_in, size_out, **common)


def _build_experts(case: Case) -> torch.nn.Module:
    config = config_of(Setting(1, False), num_moe_experts=EXPERTS)
    if case.implementation == "experts":
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
        from megatron.core.transformer.mlp import MLPSubmodules
        from megatron.core.transformer.moe.experts import SequentialMLP
        from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

        from slime_plugins.lora.layers import linears_of_experts

        parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        return linears_of_experts(SequentialMLP(EXPERTS, config, parts, get_default_pg_collection()))[
            f"linear_{case.linear}"
        ]
    te = _transformer_engine()
    _, parallel, size_in, size_out = LINEARS[case.linear]
    kind = {"column": te.TEColumnParallelGroupedLinear, "row": te.TERowParallelGroupedLinear}[parallel]
    common = dict(config=config, init_method=config.init_method, bias=False, skip_bias_add=False, is_expert=True)
    return kind(EXPERTS, size_in, size_out, **common)


def _transformer_engine():
    from megatron.core.extensions import transformer_engine

    return transformer_engine


def find_bridge(wheel: str) -> None:
    """Let ``megatron.bridge`` be found in its wheel, without what its packages import when they are."""
    for name in ("megatron.bridge", "megatron.bridge.peft", "megatron.bridge.utils"):
        package = types.ModuleType(name)
        package.__path__ = [f"{wheel}/{name.replace('.', '/')}"]
        sys.modules[name] = package


def _in_bridge(linear: torch.nn.Module, name: str) -> torch.nn.Module:
    """As ``megatron.bridge.peft.lora.LoRA.transform`` wraps it."""
    from megatron.bridge.peft.lora_layers import LoRALinear
    from megatron.bridge.peft.utils import ParallelLinearAdapter, get_adapter_attributes_from_linear

    of = get_adapter_attributes_from_linear(linear)
    adapter = ParallelLinearAdapter(
        of.in_features,
        of.out_features,
        RANK,
        base_linear_name=name,
        activation="identity",
        input_is_parallel=of.input_is_parallel,
        model_parallel_config=linear.config,
        alpha=3 * RANK,
        disable_tensor_parallel_comm=of.disable_tensor_parallel_comm,
        disable_sequence_parallel_comm=of.disable_sequence_parallel_comm,
        base_linear_is_parallel=of.base_linear_is_parallel,
    )
    return LoRALinear(linear, adapter)


def _peft_linear(size_in: int, size_out: int, layout: str | None) -> torch.nn.Module:
    linear = torch.nn.Linear(size_in, size_out, bias=False).requires_grad_(False)
    if layout is None:
        return torch.nn.Sequential(linear)
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    config = LoraConfig(r=RANK, lora_alpha=3 * RANK, init_lora_weights=False)
    return torch.nn.Sequential(Linear(linear, "default", config=config, r=RANK, lora_alpha=3 * RANK))
