"""One linear of Megatron's alone: the config of a layer that it could lie in, its adapter, groups of one process."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.transformer.transformer_config import TransformerConfig

from slime_plugins.lora import LoRAConfig
from slime_plugins.lora.layers import adapt, frozen_of, kind_of, spec_for
from slime_plugins.lora.names import hf_names


def layer_config(hidden: int, heads: int, *, on: torch.device | str = "cpu", **more: Any) -> TransformerConfig:
    """Of one layer, without biases unless ``more`` has them; weights are made on the CPU, or on the GPU ``on``."""
    settings = dict(
        num_layers=1,
        hidden_size=hidden,
        num_attention_heads=heads,
        add_bias_linear=False,
        use_cpu_initialization=torch.device(on).type == "cpu",
    )
    return TransformerConfig(**settings | more)


def adapt_alone(linear: torch.nn.Module, name: str, config: LoRAConfig, linears: str = "auto"):
    """Put an adapter on all projections of a linear; ``name`` is its global one. Returns what is frozen under it."""
    base = frozen_of(linear)
    spec = spec_for(base, name, tuple(range(len(hf_names(name)))), config)
    adapt(linear, kind_of(linear).form, base, spec, None, linears)
    return base


@contextlib.contextmanager
def single_process_groups(backend: str):
    """Megatron's groups for this process alone."""
    from megatron.core import tensor_parallel

    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mpu.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    try:
        yield
    finally:
        mpu.destroy_model_parallel()
        dist.destroy_process_group()
