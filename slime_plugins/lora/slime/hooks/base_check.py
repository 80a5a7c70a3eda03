"""Do the engines hold the base that trains? They start from ``--hf-checkpoint``; the trainer may start elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open

from slime_plugins.lora.adapters import iter_linears
from slime_plugins.lora.ends.export import _gather_tp
from slime_plugins.lora.layers import LoRALinear, OneExpert
from slime_plugins.lora.names import hf_names
from slime_plugins.lora.slime.hooks.policies import _any_rank, same_base


@torch.no_grad()
def refuse_other_base(model, hf_checkpoint: str) -> None:
    """Compare the first and last adapted linear of every pipeline stage with the Hugging Face checkpoint's.

    Collectives:
        all_gather over tensor-parallel groups, one all_reduce over all ranks.
    Raises:
        ValueError: they differ: an adapter trained on this base would be served on another one.
    """
    if same_base(hf_checkpoint, None, model):
        return
    linears = list(iter_linears(model))
    wrong = [name for linear in linears[:1] + linears[-1:] for name in _differing(linear, Path(hf_checkpoint))]
    if _any_rank(bool(wrong)):
        named = f" ({', '.join(wrong)} differ)" if wrong else ""
        raise ValueError(
            f"--lora-sync adapter: the engines start from --hf-checkpoint {hf_checkpoint}, which is not the base that "
            f"trains{named}; give the base as --hf-checkpoint, or use --lora-sync merged"
        )


def _differing(linear: LoRALinear | OneExpert, checkpoint: Path) -> list[str]:
    """Projections of one linear that are not, bit for bit after the cast, what the checkpoint has."""
    names = hf_names(linear.lora.name)
    wrong = []
    for part, name in zip(linear.lora.all_parts, names):
        rows = part.take(linear.weight.detach())
        dim = 0 if linear.lora.parallel == "column" else 1
        whole = _gather_tp(rows, linear.lora_tp_group, dim=dim).cpu()
        expected = _read(checkpoint, f"{name}.weight")
        if expected is None or not torch.equal(whole, expected.to(whole.dtype)):
            wrong.append(name)
    return wrong


def _read(checkpoint: Path, key: str) -> torch.Tensor | None:
    index = checkpoint / "model.safetensors.index.json"
    if index.is_file():
        file = json.loads(index.read_text())["weight_map"].get(key)
    else:
        file = "model.safetensors"
    if file is None or not (checkpoint / file).is_file():
        return None
    with safe_open(checkpoint / file, framework="pt") as tensors:
        return tensors.get_tensor(key) if key in tensors.keys() else None  # noqa: SIM118 - not a mapping
