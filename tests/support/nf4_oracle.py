"""The oracle of a 4-bit base: transformers + bitsandbytes (+ PEFT) in one process, and checkpoints for it."""

from __future__ import annotations

import shutil
from pathlib import Path

import reference
import torch
from safetensors.torch import load_file, save_file

from slime_plugins.lora.rehearsal.tiny import make_tiny

RANK, ALPHA = 4, 12.0
_made: dict[tuple, Path] = {}


def checkpoint(tmp_path_factory, family: str = "qwen3", dtype=torch.float32, **sizes) -> Path:
    """A model whose every matrix divides into blocks at tensor-parallel size 2, with nested groups that shards cut."""
    key = family, dtype, *sizes.items()
    if key not in _made:
        sizes = dict(num_layers=2, hidden=192, num_heads=8, num_kv_heads=4, head_dim=32, ffn=640) | sizes
        _made[key] = make_tiny(tmp_path_factory.mktemp("nf4"), family, dtype=dtype, **sizes)
    return _made[key]


def bnb_config(double_quant: bool = True, dtype=torch.float32, skip=()):
    """What a user of transformers writes."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", *skip],
    )


def peft_model(hf_dir, dtype=torch.float32, double_quant=True, **kwargs):
    bnb = bnb_config(double_quant, dtype)
    return reference.peft_model(hf_dir, rank=RANK, alpha=ALPHA, dtype=dtype, bnb=bnb, **kwargs).train()


def saved_in_codes(hf_dir, out: Path, dtype=torch.bfloat16, double_quant=True, skip=(), **config) -> Path:
    """What transformers + bitsandbytes write of a model that they have quantised."""
    from transformers import AutoModelForCausalLM

    bnb = bnb_config(double_quant, dtype, skip)
    vars(bnb).update(config)
    AutoModelForCausalLM.from_pretrained(
        hf_dir, dtype=dtype, quantization_config=bnb, device_map={"": "cpu"}
    ).save_pretrained(out)
    for file in hf_dir.glob("tokenizer*"):
        shutil.copyfile(file, out / file.name)
    return out


def dequantised(model) -> dict[str, torch.Tensor]:
    """Hugging Face name -> weight, by bitsandbytes, of every 4-bit linear of a transformers model."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            name = name.removeprefix("base_model.model.").removesuffix(".base_layer")
            found[name] = dequantize_4bit(module.weight.data, module.weight.quant_state)
    return found


def dense_copy(hf_dir, weights: dict[str, torch.Tensor], out: Path) -> Path:
    """A checkpoint like ``hf_dir`` with these weights in it."""
    shutil.copytree(hf_dir, out)
    tensors = load_file(hf_dir / "model.safetensors")
    for name, weight in weights.items():
        assert tensors[f"{name}.weight"].shape == weight.shape
        tensors[f"{name}.weight"] = weight.contiguous()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def in_codes(hf_dir, names, out: Path) -> Path:
    """A checkpoint with these linears in codes, as bitsandbytes serialises them: also of experts, which transformers 5
    leaves dense."""
    from bitsandbytes.functional import quantize_4bit

    shutil.copytree(hf_dir, out)
    tensors = load_file(hf_dir / "model.safetensors")
    for name in names:
        weight = f"{name}.weight"
        codes, state = quantize_4bit(tensors[weight], quant_type="nf4", compress_statistics=True)
        tensors[weight] = codes
        tensors |= {f"{weight}.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


MOE_SIZES = dict(HIDDEN=192, HEAD_DIM=32, FFN=384, EXPERT_FFN=128, SHARED_FFN=128)
MOE_SIZES["MLA"] = dict(q_lora_rank=128, kv_lora_rank=64, qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=32)
"""Of ``moe_models``, so that everything divides into blocks at (expert-)tensor-parallel size 2."""


def through_codes(hf_dir, names) -> dict[str, torch.Tensor]:
    """Linears of a checkpoint, quantised with nested scales and dequantised by bitsandbytes one by one."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    tensors = load_file(hf_dir / "model.safetensors")
    found = {}
    for name in names:
        codes, state = quantize_4bit(tensors[f"{name}.weight"], quant_type="nf4", compress_statistics=True)
        found[name] = dequantize_4bit(codes, state)
    return found
