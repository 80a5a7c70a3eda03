"""A transformers model on the base that a trainer has, dense or in 4 bits with the same bits."""

from __future__ import annotations

import os
from typing import Any

import torch

from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.base.quantization import BaseQuant, dense_modules
from slime_plugins.lora.files.safetensors import torch_dtype
from slime_plugins.lora.quant import nf4
from slime_plugins.lora.quant.dequantize import decoder_linears


def load_base(hf_dir: str | os.PathLike, dtype: torch.dtype, device: str, quant: BaseQuant | None = None) -> Any:
    """``AutoModelForCausalLM`` in ``dtype`` on a device. A checkpoint in NF4 codes keeps them, whatever ``quant`` is.

    On CPUs with bf16 instructions bitsandbytes rounds scales to bf16 when a model is evaluated, for a kernel of its
    own. That is switched off: it is not the base that is trained.
    """
    from transformers import AutoModelForCausalLM

    checkpoint = BaseCheckpoint(hf_dir)
    if quant is None and not checkpoint.coded:
        return AutoModelForCausalLM.from_pretrained(hf_dir, dtype=dtype).to(device)
    nf4.bitsandbytes()
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import BitsAndBytesConfig

    if checkpoint.coded:
        # transformers takes neither the product's dtype nor that of the other weights from its caller here.
        model = AutoModelForCausalLM.from_pretrained(hf_dir, device_map={"": device})
        if any(torch_dtype(weight.dtype) != dtype for weight in checkpoint.coded.values()):
            # Of codes made in bf16 bitsandbytes' products in float32 leave out the rounding to bf16 (from 0.50 on).
            model = model.dequantize()
    else:
        assert quant is not None
        dense = dense_modules(quant, decoder_linears(checkpoint), mla=checkpoint.mla)
        config = BitsAndBytesConfig(**quant.to_hf(map(checkpoint.spelled, dense)), bnb_4bit_compute_dtype=dtype)
        model = AutoModelForCausalLM.from_pretrained(
            hf_dir, dtype=dtype, quantization_config=config, device_map={"": device}
        )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype, module.compute_type_is_set = dtype, True
    for parameter in model.parameters():
        if parameter.is_floating_point() and not isinstance(parameter, Params4bit):
            parameter.data = parameter.data.to(dtype)
    return model
