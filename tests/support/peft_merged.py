"""The judge of all merging: transformers + PEFT, merged in float32, rounded once, by the names of the base's files."""

from __future__ import annotations

from pathlib import Path

import torch


def merge_and_unload(base: Path, adapter: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Name in the base's files -> weight in ``dtype``; of a tied base ``lm_head.weight`` too."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    weights = {}
    for name, tensor in merged.state_dict().items():
        experts, _, leaf = name.rpartition(".experts.")
        if not experts:
            weights[name] = tensor.to(dtype)
            continue
        leaves = ["gate_proj", "up_proj"] if leaf == "gate_up_proj" else [leaf]
        for i, expert in enumerate(tensor):
            for half, piece in zip(leaves, expert.chunk(len(leaves))):
                weights[f"{experts}.experts.{i}.{half}.weight"] = piece.to(dtype)
    return weights
