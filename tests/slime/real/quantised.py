"""Imported into every process of a run: CPU versions of the two GPU kernels that slime's quantisers call.

Their arguments and results are those of slime's ``blockwise_cast_to_fp8_triton`` and of its extension
``fake_int4_quant_cuda``; everything around them is slime's.
"""

import sys
import types
from pathlib import Path

import slime_cpu_hooks

sys.path.append(str(Path(__file__).parents[2] / "support"))


def _fp8_kernels():
    import engine_quantisers

    return {"blockwise_cast_to_fp8_triton": lambda x, block_size: engine_quantisers.fp8(x, tuple(block_size))}


def _int4(weight, block, symmetric):
    """Values in the weight's dtype, scales and zero points per group."""
    import torch

    assert symmetric and block[0] == 1
    parts = weight.float().unflatten(1, (-1, block[1]))
    scale = (parts.abs().amax(2) / 7).clamp(min=1e-5)
    values = (parts / scale.unsqueeze(2)).round().flatten(1)
    return values.to(weight.dtype), scale.to(weight.dtype), torch.zeros_like(scale, dtype=weight.dtype)


sys.modules["fake_int4_quant_cuda"] = types.ModuleType("fake_int4_quant_cuda")
sys.modules["fake_int4_quant_cuda"].fake_int4_quant_cuda = _int4
slime_cpu_hooks.replace("slime.backends.megatron_utils.kernels.fp8_kernel", _fp8_kernels)
