"""A PEFT adapter directory -> a checkpoint without a step, in one plain process: no Megatron, no process group."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from slime_plugins.lora.base import fingerprint as base
from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.checkpoint import directory, storage
from slime_plugins.lora.checkpoint.manifest import Manifest
from slime_plugins.lora.checkpoint.writer import complete, pack_common
from slime_plugins.lora.config import LoRAConfig
from slime_plugins.lora.names import hf_names, in_layer_order
from slime_plugins.lora.peft.extra import extra_of, put_extra, refuse_part_of_base
from slime_plugins.lora.peft.read import PeftAdapter, config_options
from slime_plugins.lora.peft.rows import LEAVES
from slime_plugins.lora.projections import Adapter


def import_checkpoint(
    adapter_dir: str | os.PathLike,
    hf_checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    *,
    names: str | None = None,
) -> tuple[Path, Manifest, str]:
    """Write ``out``/release, which ``load_adapter`` reads into a model of ``LoRAConfig.from_peft(adapter_dir)``.

    Layout ``fused`` where the projections of every linear share their A, else ``split``. The whole base is read, for
    the fingerprint that a load compares.

    Args:
        names: what the adapter must be spelled in, one of ``base.spelling.SPELLINGS``; None reads every one.
    Returns:
        where it is, what it says, and what of the base was compared with what the adapter notes, for people.
    Raises:
        UsageError: ``hf_checkpoint`` is no checkpoint.
        ValueError, OSError: the adapter is damaged, holds what Megatron cannot, does not fit the base, or was made for
            another one.
    """
    checkpoint = BaseCheckpoint(hf_checkpoint)
    source = PeftAdapter(adapter_dir, checkpoint, carries=True)
    source.refuse_other_names(names)
    refuse_part_of_base(adapter_dir, checkpoint.weights)
    other, compared = source.tensors.other_base(checkpoint, full=True)
    if other:
        raise ValueError(f"{adapter_dir}: {other}")
    config = LoRAConfig(**config_options(source))
    adapters: dict[str, Adapter] = {}
    shards: list[storage.Shard] = []
    for linear, modules in sorted(source.linears().items(), key=lambda item: in_layer_order(item[0])):
        split = config.layout == "split" and len(hf_names(linear)) > 1
        pairs = [source.pair(module) for module in modules]
        for module, (A, B) in zip(modules, pairs):
            _check_fits(checkpoint, module, A, B)
        ranks = tuple(A.shape[0] for A, _ in pairs)
        leaves = tuple(module.rpartition(".")[2] for module in modules)
        scalings = tuple(source.scaling(module) for module in modules)
        adapters[linear] = Adapter(leaves, ranks, scalings, "split" if split else "fused")
        for key, tensor in adapters[linear].tensors(pairs).items():
            whole = tensor.contiguous().clone()
            shards.append(storage.Shard(f"{linear}.{key}", whole, tuple(whole.shape), (0, 0)))
    names_of = {leaf: name for name, leaf in LEAVES.items()}
    for rows in source.rows(checkpoint):
        delta = rows.delta.contiguous()
        shards.append(storage.Shard(f"{names_of[rows.leaf]}.lora_rows", delta, tuple(delta.shape), (0, 0)))
    layers = range(base.number_of_layers(checkpoint))
    fingerprint = base.fingerprint_of_hf(checkpoint, base.dtype_of_hf(checkpoint), layers)
    quant = source.tensors.base_quant
    if quant is not None:
        fingerprint["quantization"] = quant.to_dict()
    manifest = Manifest(
        step=None,
        config=config,
        adapters=adapters,
        base=fingerprint,
        optimizer=None,
        parallelism={"world": 0},  # of no run: it has no random states
    )
    extra = extra_of(adapter_dir)
    staged = directory.stage(out, None)
    try:
        written = storage.write_shards(staged, 0, shards)
    except BaseException:
        directory.discard(staged)
        raise
    done = complete(staged, [written], pack_common(), manifest)
    put_extra(out, extra)
    return done, manifest, compared


def _check_fits(checkpoint: BaseCheckpoint, module: str, A: torch.Tensor, B: torch.Tensor) -> None:
    shape, found = (B.shape[0], A.shape[1]), checkpoint.linear_shape(checkpoint.spelled(checkpoint.canonical(module)))
    if found != shape:
        has = f"has {list(found)}" if found else "has none of that name"
        raise ValueError(f"{module} is adapted as a {list(shape)} matrix, but {checkpoint.directory} {has}")
