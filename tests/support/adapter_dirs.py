"""Small adapters and bases on disk for tests, every dimension different so that a transpose cannot hide."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from slime_plugins.lora.peft.config import key_of

RANK, ALPHA, LAYERS, HIDDEN, INNER, KV = 3, 6, 2, 8, 20, 4
SHAPES = {  # leaf of the module -> [out, in]
    "self_attn.q_proj": (HIDDEN + 2, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN + 2),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def modules(leaves=tuple(SHAPES), layers=LAYERS) -> dict[str, tuple[int, int]]:
    """Full names of the adapted linears -> [out, in]."""
    return {f"model.layers.{layer}.{leaf}": SHAPES[leaf] for layer in range(layers) for leaf in leaves}


def adapter(linears=None, rank=RANK, dtype=torch.float32, seed=0) -> tuple[dict, dict[str, torch.Tensor]]:
    """Config and tensors of a trained adapter (B is not zero)."""
    generator = torch.Generator().manual_seed(seed)
    linears = modules() if linears is None else linears
    tensors = {}
    for name, (rows, columns) in linears.items():
        tensors[key_of(name, "A")] = torch.randn(rank, columns, generator=generator).to(dtype)
        tensors[key_of(name, "B")] = torch.randn(rows, rank, generator=generator).to(dtype)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/base",
        "r": rank,
        "lora_alpha": ALPHA,
        "target_modules": sorted({name.rpartition(".")[2] for name in linears}),
        "bias": "none",
    }
    return config, tensors


def base_checkpoint(directory: Path, linears=None, shards=1, seed=0, config='{"num_hidden_layers": 2}') -> Path:
    """A Hugging Face checkpoint directory with these linears, an embedding and a norm."""
    import json

    generator = torch.Generator().manual_seed(seed)
    directory.mkdir(parents=True, exist_ok=True)
    linears = modules() if linears is None else linears
    weights = {f"{name}.weight": torch.randn(*shape, generator=generator) for name, shape in linears.items()}
    weights["model.embed_tokens.weight"] = torch.randn(11, HIDDEN, generator=generator)
    weights["model.norm.weight"] = torch.ones(HIDDEN)
    (directory / "config.json").write_text(config)
    if shards == 1:
        save_file(weights, directory / "model.safetensors")
        return directory
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {key: names[i % shards] for i, key in enumerate(weights)}
    for name in names:
        save_file({key: weights[key] for key in weights if weight_map[key] == name}, directory / name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory
