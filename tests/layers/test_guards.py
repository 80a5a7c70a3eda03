"""Settings that a frozen base cannot have, on modules that look like TE's and Megatron's. Pure.

pytest tests/layers/test_guards.py        # TE's own store: make contracts
"""

from __future__ import annotations

import types

import pytest
import torch

from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.layers.guards import guard_frozen


def linear(*, frozen=True, **attributes) -> torch.nn.Linear:
    module = torch.nn.Linear(2, 2)
    module.requires_grad_(not frozen)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def test_bulk_overlap_goes_from_frozen_linears_alone():
    on = dict(ub_bulk_wgrad=True, ub_bulk_dgrad=True)
    model = torch.nn.Sequential(linear(**on), linear(frozen=False, **on), linear())
    assert guard_frozen([model]) == ["0"]
    assert (model[0].ub_bulk_wgrad, model[0].ub_bulk_dgrad) == (False, False)
    assert (model[1].ub_bulk_wgrad, model[1].ub_bulk_dgrad) == (True, True)
    assert guard_frozen([model]) == []


FREED = types.SimpleNamespace(overlap_moe_expert_parallel_comm=True, fp8="e4m3")


def delayed(on: bool):
    return types.SimpleNamespace(delay_wgrad_compute=lambda: on)


@pytest.mark.parametrize(
    "module, reason",
    [
        (linear(wgrad_store=delayed(True)), "0 delays its weight gradient.*drop --delay-wgrad-compute"),
        (linear(config=types.SimpleNamespace(use_transformer_engine_op_fuser=True)), "never call"),
        (type("TEFusedMLP", (torch.nn.Module,), {})(), "never call"),
        (linear(_slime_deepgemm_forward_wrapped=True), "drop --megatron-deepgemm"),
        (linear(config=types.SimpleNamespace(enable_cuda_graph=True)), "CUDA graph"),
        (type("AbsorbedMLASelfAttention", (torch.nn.Module,), {})(), "kv_b_proj would have no adapter.*use .*MLASelf"),
        (
            linear(lora=types.SimpleNamespace(experts=range(2)), config=FREED),
            "0 would have its input's memory given back.*drop one of them, or exclude the experts",
        ),
        (linear(config=types.SimpleNamespace(cuda_graph_impl="local")), "CUDA graph"),
    ],
)
def test_what_cannot_be_is_refused_by_name(module, reason):
    with pytest.raises(UsageError, match=reason):
        guard_frozen([torch.nn.Sequential(module)])


def test_what_is_off_passes():
    fine = types.SimpleNamespace(overlap_moe_expert_parallel_comm=True, fp8=None)
    one = linear(lora=types.SimpleNamespace(experts=None), config=FREED)
    assert guard_frozen([torch.nn.Sequential(linear(lora=one.lora, config=fine), one, linear(config=FREED))]) == []
    off = types.SimpleNamespace(cuda_graph_impl="none", enable_cuda_graph=False, use_transformer_engine_op_fuser=False)
    model = torch.nn.Sequential(
        linear(config=off, wgrad_store=delayed(False)), linear(frozen=False, wgrad_store=delayed(True))
    )
    assert guard_frozen([model]) == []
