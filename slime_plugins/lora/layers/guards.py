"""What a frozen base cannot have switched on in TransformerEngine and Megatron: turned off, or refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from slime_plugins.lora.errors import UsageError

BULK_OVERLAP = ("ub_bulk_wgrad", "ub_bulk_dgrad")
"""TE's attributes of ``--tp-comm-overlap`` that move communication into the weight gradient's GEMM."""


def guard_frozen(model: Iterable[torch.nn.Module]) -> list[str]:
    """Make the linears of a frozen base safe to train adapters around. Call once the base is frozen.

    Returns:
        Names of modules whose bulk overlap has been turned off. With ``--tp-comm-overlap`` TE launches the input
        gradient's reduce-scatter inside the weight gradient's GEMM, which a frozen weight skips: the input gradient
        would be wrong without an error (TE 2.10 to 2.20; ``module/linear.py``, ``module/layernorm_linear.py``).

    Raises:
        UsageError: a setting under which adapters are not called, or the first backward fails.
    """
    changed = []
    for chunk in model:
        for name, module in chunk.named_modules():
            weights = [p for n, p in module.named_parameters(recurse=False) if n.startswith("weight")]
            if weights and all(not p.requires_grad for p in weights):
                _refuse_delayed(name, module)
                if any(getattr(module, attribute, False) for attribute in BULK_OVERLAP):
                    for attribute in BULK_OVERLAP:
                        setattr(module, attribute, False)
                    changed.append(name)
            _refuse_fused(name, module)
    return changed


def _refuse_delayed(name: str, module: torch.nn.Module) -> None:
    store = getattr(module, "wgrad_store", None)
    if store is not None and store.delay_wgrad_compute():
        raise UsageError(
            f"{name} delays its weight gradient (--delay-wgrad-compute), and frozen it has none to queue "
            '("Pop empty queue" in the first backward); drop --delay-wgrad-compute'
        )


def _refuse_fused(name: str, module: torch.nn.Module) -> None:
    """Modules that read the weights of their linears and never call them."""
    config = getattr(module, "config", None)
    if type(module).__name__ == "TEFusedMLP" or getattr(config, "use_transformer_engine_op_fuser", False):
        raise UsageError(
            f"{name} computes from the weights of its linears (--use-transformer-engine-op-fuser) and would never "
            "call their adapters; drop --use-transformer-engine-op-fuser"
        )
    if any(kind.__name__ == "AbsorbedMLASelfAttention" for kind in type(module).__mro__):
        raise UsageError(
            f"{name} (AbsorbedMLASelfAttention) multiplies with the halves of kv_b_proj's weight itself and calls no "
            "linear of it: kv_b_proj would have no adapter; use Megatron's MLASelfAttention"
        )
    if getattr(module, "_slime_deepgemm_forward_wrapped", False):
        raise UsageError(
            f"{name} has the forward of slime's deepgemm alignment, past its adapter; drop --megatron-deepgemm-*"
        )
    _refuse_freed(name, module, config)
    impl = getattr(config, "cuda_graph_impl", "none")
    if (
        getattr(config, "enable_cuda_graph", False)
        or getattr(config, "external_cuda_graph", False)
        or impl
        not in (
            None,
            "none",
        )
    ):
        raise UsageError(
            f"{name} is to be captured in a CUDA graph, which would replay adapters that have been switched off for "
            "the reference or a teacher; drop --enable-cuda-graph, --external-cuda-graph and --cuda-graph-impl"
        )


def _refuse_freed(name: str, module: torch.nn.Module, config: Any) -> None:
    """Megatron's overlap of all-to-alls gives an expert's input back once TE has cast it; A's gradient is made of it.

    (``should_free_input`` in ``fine_grained_callables.py``.)
    """
    experts = getattr(getattr(module, "lora", None), "experts", None)
    low = getattr(config, "fp8", None) or getattr(config, "fp4", None)
    if experts is not None and low and getattr(config, "overlap_moe_expert_parallel_comm", False):
        raise UsageError(
            f"{name} would have its input's memory given back before its adapter's backward "
            "(--overlap-moe-expert-parallel-comm with FP8 or FP4); drop one of them, or exclude the experts"
        )
