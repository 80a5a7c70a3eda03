"""The one-process reference: transformers + PEFT on the same tiny checkpoint with the same adapter values."""

from __future__ import annotations

import hashlib

import torch

LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "fc1", "up_proj": "fc1"}


def draw(key: str, *shape: int) -> torch.Tensor:
    """Standard normal values that depend on the key alone."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "little")
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapter_values(name: str, rank: int, fan_in: int, fan_out: int, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of one projection's A and B, none of them zero. With ``fused``, q, k, v share A, and gate, up share A."""
    parent, leaf = name.rsplit(".", 1)
    A_key = f"{parent}.{FUSED.get(leaf, leaf)}" if layout == "fused" else name
    return draw(f"A {A_key}", rank, fan_in) / fan_in**0.5, draw(f"B {name}", fan_out, rank) * 0.3


def batch(vocab_size: int, num_samples: int = 4, length: int = 16) -> torch.Tensor:
    """Tokens [num_samples, length + 1]: inputs and, one on, labels."""
    return torch.randint(4, vocab_size, (num_samples, length + 1), generator=torch.Generator().manual_seed(7))


def peft_model(
    hf_dir, *, rank: int, alpha: float, layout: str = "fused", targets=LEAVES, dtype=torch.float32, bnb=None, **kwargs
):
    """transformers + PEFT with ``adapter_values``, eager attention. ``bnb``: a BitsAndBytesConfig for the base."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    quantized = {} if bnb is None else {"quantization_config": bnb, "device_map": "cpu"}
    base = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=dtype, attn_implementation="eager", **quantized)
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), **kwargs))
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(module, "lora_A"):
                A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
                values = adapter_values(_plain(name), A.shape[0], A.shape[1], B.shape[0], layout)
                A.copy_(values[0])
                B.copy_(values[1])
    return model


def logits_loss_grads(model, tokens: torch.Tensor):
    """Logits [N, S, V], mean cross-entropy, and the gradients of every A and B by projection name."""
    logits = model(tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    grads = {
        _plain(name): (module.lora_A["default"].weight.grad, module.lora_B["default"].weight.grad)
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    return logits.detach(), loss.item(), grads


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.")
