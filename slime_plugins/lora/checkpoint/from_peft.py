"""A PEFT adapter directory -> a checkpoint without a step, in one plain process: no Megatron, no process group."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from slime_plugins.lora.checkpoint import base, directory, storage
from slime_plugins.lora.checkpoint.manifest import Adapter, Manifest
from slime_plugins.lora.checkpoint.writer import complete, pack_common
from slime_plugins.lora.hf.headers import BaseCheckpoint
from slime_plugins.lora.hf.import_ import PeftAdapter, config_from_peft
from slime_plugins.lora.names import hf_names


def import_checkpoint(
    adapter_dir: str | os.PathLike, hf_checkpoint: str | os.PathLike, out: str | os.PathLike
) -> tuple[Path, Manifest]:
    """Write ``out``/release, which ``load_adapter`` reads into a model of ``LoRAConfig.from_peft(adapter_dir)``.

    Layout ``fused`` where the projections of every linear share their A, else ``split``. The first and the last
    layer of the base are read, for the fingerprint that a load compares.

    Raises:
        UsageError: ``hf_checkpoint`` is no checkpoint.
        ValueError, OSError: the adapter is damaged, holds what Megatron cannot, or does not fit the base.
    """
    checkpoint = BaseCheckpoint(hf_checkpoint)
    config = config_from_peft(adapter_dir)
    source = PeftAdapter(adapter_dir)
    adapters: dict[str, Adapter] = {}
    shards: list[storage.Shard] = []
    for linear, modules in sorted(source.linears().items(), key=lambda item: _order(item[0])):
        split = config.layout == "split" and len(hf_names(linear)) > 1
        pairs = [source.pair(module) for module in modules]
        for module, (A, B) in zip(modules, pairs):
            _check_fits(checkpoint, module, A, B)
        ranks = tuple(A.shape[0] for A, _ in pairs)
        leaves = tuple(module.rpartition(".")[2] for module in modules)
        scalings = tuple(source.scaling(module) for module in modules)
        adapters[linear] = Adapter(leaves, ranks, scalings, "split" if split else "fused")
        shards += _shards(linear, leaves, pairs, max(ranks), split)
    layers = base.architecture_of_hf(checkpoint.config)["num_layers"]
    manifest = Manifest(
        step=None,
        config=config,
        adapters=adapters,
        base=base.fingerprint_of_hf(checkpoint, base.dtype_of_hf(checkpoint), sorted({0, layers - 1})),
        optimizer=None,
        parallelism={"world": 0},  # of no run: it has no random states
    )
    staged = directory.stage(out, None)
    written = storage.write_shards(staged, 0, shards)
    return complete(staged, [written], pack_common(), manifest), manifest


def _shards(linear: str, leaves, pairs, rank: int, split: bool):
    """Whole tensors under the names that ``layers.sharding`` gives them; of a split layout padded to one rank."""
    tensors = {f"{linear}.lora_A": pairs[0][0]} if not split else {}
    for leaf, (A, B) in zip(leaves, pairs):
        pad = rank - A.shape[0]
        if split:
            tensors[f"{linear}.lora_A.{leaf}"] = torch.nn.functional.pad(A, (0, 0, 0, pad))
        tensors[f"{linear}.lora_B.{leaf}"] = torch.nn.functional.pad(B, (0, pad))
    for key, tensor in tensors.items():
        yield storage.Shard(key, tensor.contiguous().clone(), tuple(tensor.shape), (0, 0))


def _check_fits(checkpoint: BaseCheckpoint, module: str, A: torch.Tensor, B: torch.Tensor) -> None:
    shape, found = (B.shape[0], A.shape[1]), checkpoint.linear_shape(module)
    if found != shape:
        has = f"has {list(found)}" if found else "has none of that name"
        raise ValueError(f"{module} is adapted as a {list(shape)} matrix, but {checkpoint.directory} {has}")


def _order(name: str) -> tuple:
    return tuple(int(piece) if piece.isdigit() else piece for piece in name.split("."))
