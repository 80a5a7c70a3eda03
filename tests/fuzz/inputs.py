"""The kinds of input that are damaged, what is done with each, and what comes out when nothing is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adapter_dirs
import torch
import zero_checkpoints
from safetensors.torch import load_file

from slime_plugins.lora.checkpoint.manifest import _self_digest
from slime_plugins.lora.checkpoint.reader import AdapterCheckpoint
from slime_plugins.lora.cli import main
from slime_plugins.lora.peft.directory import write_adapter

CONFIG = json.dumps({
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 20,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 5, "tie_word_embeddings": False,
})  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One kind of input. ``{}`` in ``argv`` is the damaged copy, ``OUT`` where the verb writes."""

    name: str
    source: Path
    argv: tuple[str, ...]
    result: Callable[[Path, str], Any]
    """Place written and text printed -> what has to be equal to the undamaged result."""
    names: tuple[str, ...] = ("*",)
    """Patterns of the files that are damaged."""
    forged: bool = False
    """Its own checksum is made to fit: what it then says is another truth, which nobody can tell."""


def kinds(root: Path) -> list[Kind]:
    """Make one good input of every kind below ``root``."""
    base = adapter_dirs.base_checkpoint(root / "base", shards=2, config=CONFIG)
    first = root / "noted"
    write_adapter(first, *adapter_dirs.adapter(), base=base)
    run, adapter = root / "run", root / "adapter"
    hf = ("--hf-checkpoint", str(base))
    assert main(["import", "--adapter", str(first), *hf, "--out", str(run)]) == 0
    assert main(["export", "--checkpoint", str(run), *hf, "--out", str(adapter)]) == 0
    legacy = root / "bin"
    legacy.mkdir()
    torch.save(load_file(adapter / "adapter_model.safetensors"), legacy / "adapter_model.bin")
    (legacy / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    zero = [
        zero_checkpoints.Zero([zero_checkpoints.trained()], stage=stage).write(root / f"zero{stage}")
        for stage in (2, 3)
    ]
    export, damaged = ("export", "--checkpoint", str(run), "--out", "OUT"), ("--hf-checkpoint", "{}")
    weights = ("*.safetensors", "*.json")
    into = ("import", "--adapter")
    found = [
        Kind("base: merge", base, (*export, *damaged, "--merge"), _merged, weights),
        Kind("base: export", base, (*export, *damaged), _adapter, weights),
        Kind("base: import", base, (*into, str(adapter), *damaged, "--out", "OUT"), _imported, weights),
        Kind("base: verify", base, ("verify", str(adapter), *damaged, "--full"), _verified, weights),
        Kind("adapter: verify", adapter, ("verify", "{}", *hf, "--full"), _verified),
        Kind("adapter: import", adapter, (*into, "{}", *hf, "--out", "OUT"), _imported),
        Kind(
            "adapter .bin: import", legacy, (*into, "{}", *hf, "--out", "OUT"), _imported, ("*.bin",)
        ),
        Kind("checkpoint: export", run, ("export", "--checkpoint", "{}", *hf, "--out", "OUT"), _adapter),
        Kind(
            "checkpoint, forged", run, ("export", "--checkpoint", "{}", *hf, "--out", "OUT"), _adapter,
            ("adapter.json", "tensors.json"), True,
        ),
    ]  # fmt: skip
    for stage, directory in zip((2, 3), zero):
        argv = ("convert-zero", "{}", "--lora-alpha", "10", "--out", "OUT")
        found.append(Kind(f"ZeRO-{stage}: convert", directory, argv, _adapter))
    return found


def forge(directory: Path) -> None:
    """Make the checksums in a sharded checkpoint fit what its files hold now."""
    import hashlib

    path = next(directory.rglob("adapter.json"))
    try:
        content = json.loads(path.read_bytes())
        for name in [name for name in content["sha256"] if name != "this file"]:
            content["sha256"][name] = hashlib.sha256((path.parent / name).read_bytes()).hexdigest()
        content["sha256"]["this file"] = _self_digest(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    path.write_text(json.dumps(content))


def _tensors(path: Path) -> dict[str, Any]:
    return {name: (str(tensor.dtype), tensor.tolist()) for name, tensor in load_file(path).items()}


def _merged(out: Path, printed: str) -> Any:
    return {path.name: _tensors(path) for path in sorted(out.glob("*.safetensors"))}


def _adapter(out: Path, printed: str) -> Any:
    config = json.loads((out / "adapter_config.json").read_text())
    config.pop("base_model_name_or_path")
    config.pop("lora_dropout")  # of the training, not of what the adapter computes
    return config, _tensors(out / "adapter_model.safetensors")


def _imported(out: Path, printed: str) -> Any:
    checkpoint = AdapterCheckpoint(out)
    config = checkpoint.manifest.config
    options = (config.rank, config.alpha, config.layout, config.use_rslora, config.rank_pattern, config.alpha_pattern)
    return options, [(p.name, p.A.tolist(), p.B.tolist(), p.scaling) for p in checkpoint.projections()]


def _verified(out: Path, printed: str) -> Any:
    said = ("rank, alpha", "tensors", "parameters", "largest |B|")
    return [line for line in printed.splitlines() if line.startswith(said)], printed.splitlines()[-1]
