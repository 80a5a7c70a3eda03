"""What the hooks import of slime, of its memory saver, of Ray and of megatron.training, as small modules of our own.

Nothing here imitates slime beyond names and signatures; the hooks on real slime are tests/slime.
"""

from __future__ import annotations

import sys
import types
from argparse import Namespace

import ray_stand_in
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu


def install(args: Namespace | None = None) -> types.ModuleType:
    """Put the stand-ins where imports find them. Returns the module that stands for slime's ``common``."""
    common = module(
        "slime.backends.megatron_utils.update_weight.common",
        all_gather_param=all_gather_param,
        named_params_and_buffers=named_params_and_buffers,
    )
    module("slime.utils.distributed_utils", get_gloo_group=lambda: dist.group.WORLD)
    module("torch_memory_saver", torch_memory_saver=types.SimpleNamespace(get_cpu_backup=_no_backup))
    module("megatron.training.global_vars", get_args=lambda: args)
    sys.modules["ray"] = ray_stand_in.module(nodes=2)
    return common


def module(name: str, **attributes) -> types.ModuleType:
    parts = name.split(".")
    for i in range(1, len(parts)):
        if ".".join(parts[:i]) not in sys.modules:
            sys.modules[".".join(parts[:i])] = types.ModuleType(".".join(parts[:i]))
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    sys.modules[name] = module
    return module


def _no_backup(tensor, zero_copy=False):
    return None


def named_params_and_buffers(args, model, convert_to_global_name=True):
    """Names and live parameters, pipeline layers counted over all stages."""
    for chunk in model:
        inner = chunk
        while hasattr(inner, "module"):
            inner = inner.module
        for name, parameter in inner.named_parameters():
            match = name.split(".")
            if match[:2] == ["decoder", "layers"]:
                match[2] = str(inner.decoder.layers[int(match[2])].layer_number - 1)
            yield "module.module." + ".".join(match), parameter


def all_gather_param(name: str, param):
    """The whole of one parameter: shards concatenated, the halves of a gated fc1 apart."""
    if not getattr(param, "tensor_model_parallel", False):
        return param.data
    group = mpu.get_tensor_model_parallel_group()
    shards = [torch.empty_like(param.data) for _ in range(group.size())]
    dist.all_gather(shards, param.data.contiguous(), group=group)
    if "linear_fc1" in name:
        halves = [shard.chunk(2) for shard in shards]
        shards = [half[0] for half in halves] + [half[1] for half in halves]
    return torch.cat(shards, dim=param.partition_dim)
