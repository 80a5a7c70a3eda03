"""The one-process reference for models with experts: transformers + PEFT, an A and a B for each projection."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from moe_models import EXPERTS, linears
from reference import adapter_values
from safetensors.torch import save_file


def values_of(path: Path, rank: int, layout: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Non-zero (A, B) for everything that all-linear adapts; with ``fused``, q, k, v and gate, up share their A."""
    return {name: adapter_values(name, rank, i, o, layout) for name, (o, i) in linears(path).items()}


def write_adapter(out: Path, path: Path, values, *, rank: int, alpha: float) -> Path:
    """A PEFT directory with a pair of tensors per projection and per expert.

    PEFT (0.21) makes parameters of experts of such keys, and in doing so forgets modules of the same leaf name outside
    the experts: those are named once more, as parameters. In Qwen2-MoE it does neither by itself, and in Qwen3.5-MoE
    with its tower it reads experts in its own stacked form alone, which they are written in then.
    """
    out.mkdir(exist_ok=True)
    model_type = json.loads((path / "config.json").read_text())["model_type"]
    tensors = {}
    for name, (A, B) in (_pack(values) if model_type == "qwen3_5_moe" else values).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.contiguous()
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    outside = sorted({name.split(".", 3)[3] for name in values if ".mlp." in name and ".experts." not in name})
    parameters, patterns = [f"{name}.weight" for name in outside], {}
    if not any(".experts." in name for name in values):
        parameters = []
    elif model_type in ("qwen2_moe", "qwen3_5_moe_text", "qwen3_5_moe"):
        parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        twice = r".*\.gate_up_proj"
        patterns = dict(rank_pattern={twice: 2 * rank}, alpha_pattern={twice: 2 * alpha})
    config = dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(path),
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted({name.rsplit(".", 1)[1] for name in values}),
        target_parameters=parameters or None,
        **patterns,
    )
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


def peft_model(path: Path, adapter_dir: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    return PeftModel.from_pretrained(base, adapter_dir, is_trainable=True)


def logits_and_grads(model, tokens: torch.Tensor, rank: int, inputs=lambda tokens: dict(input_ids=tokens)):
    """Logits [N, S, V] and (dA, dB) of every projection by name, of the mean cross-entropy.

    ``inputs``: of tokens, what the model is called with.
    """
    model.train()
    logits = model(**inputs(tokens[:, :-1])).logits
    torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()).backward()
    found = {}
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            module = name.removeprefix("base_model.model.").split(".lora_A.")[0]
            found[module] = (parameter.grad, model.get_parameter(name.replace(".lora_A.", ".lora_B.")).grad)
    return logits.detach(), {
        name: pair for module, pair in found.items() for name, pair in _unpack(module, *pair, rank)
    }


def _pack(values: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The inverse of ``_unpack``, over all modules: experts as PEFT stacks them."""
    packed = {name: pair for name, pair in values.items() if ".mlp.experts." not in name}
    for experts in sorted({name.rsplit(".", 2)[0] for name in values.keys() - packed.keys()}):
        gate, up, down = (
            [values[f"{experts}.{expert}.{leaf}_proj"] for expert in range(EXPERTS)] for leaf in ("gate", "up", "down")
        )
        both = [(torch.cat([g[0], u[0]]), torch.block_diag(g[1], u[1])) for g, u in zip(gate, up, strict=True)]
        for module, pairs in ((f"{experts}.base_layer", both), (experts, down)):
            packed[module] = torch.cat([A for A, _ in pairs]), torch.stack([B for _, B in pairs], -1).flatten(1)
    return packed


def _unpack(module: str, dA: torch.Tensor, dB: torch.Tensor, rank: int):
    """PEFT stacks experts: rows of A expert by expert, columns of B rank by rank, gate and up on B's diagonal."""
    if not module.endswith((".mlp.experts", ".mlp.experts.base_layer")):
        yield module, (dA, dB)
        return
    experts, fused = module.removesuffix(".base_layer"), module.endswith("base_layer")
    dA, dB = dA.reshape(EXPERTS, -1, dA.shape[1]), dB.reshape(dB.shape[0], -1, EXPERTS)
    for expert in range(EXPERTS):
        if not fused:
            yield f"{experts}.{expert}.down_proj", (dA[expert], dB[:, :, expert])
            continue
        half = dB.shape[0] // 2
        yield f"{experts}.{expert}.gate_proj", (dA[expert, :rank], dB[:half, :rank, expert])
        yield f"{experts}.{expert}.up_proj", (dA[expert, rank:], dB[half:, rank:, expert])
