"""``load_base``: a Hugging Face checkpoint as Megatron-Core modules, for a Megatron program of one's own."""

from __future__ import annotations

import os

import torch
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt.gpt_model import GPTModel

from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.rehearsal.model import build_chunks


def load_base(
    hf_checkpoint: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.float32,
    sequence_parallel: bool = False,
    recompute: str | None = None,
) -> list[GPTModel]:
    """Build this rank's pipeline chunks (one, without a virtual size) and load its shard into them. On all ranks.

    Decoders of text: Llama 3, Qwen2/2.5, Qwen3, Qwen3-MoE, Qwen3-Next, Qwen3.5. Megatron's local layers, without
    TransformerEngine. For any other model build Megatron's modules as your program does; ``apply_lora`` adapts those
    too.

    Args:
        hf_checkpoint: a local directory with ``config.json`` and safetensors.
        dtype: of parameters and activations.
        sequence_parallel: cut activations between the tensor-parallel linears along the sequence; Megatron needs it
            to train experts at a tensor-parallel size above 1.
        recompute: None, "full" (every layer) or "selective" (core attention).
    Returns:
        modules on this rank's device, in no DDP wrapper. Embeddings and logits have as many rows as TP divides; rows
        past the vocabulary are zero.
    Raises:
        UsageError: no checkpoint there, the model does not split this way, Megatron's process groups are not there,
            or there is no GPU and ``rehearsal.cpu.enable`` has not been called.
        ValueError: unsupported architecture or bad files.
    """
    if not mpu.model_parallel_is_initialized():
        raise UsageError(
            "load_base cuts the model for Megatron's process groups and there are none: call "
            "torch.distributed.init_process_group and parallel_state.initialize_model_parallel first"
        )
    if not torch.cuda.is_available() and not cpu_stand_ins_are_active():
        raise UsageError(
            "load_base puts the model on a GPU and there is none: call slime_plugins.lora.rehearsal.cpu.enable() "
            "before anything imports megatron, to run on CPU processes"
        )
    return build_chunks(
        os.fspath(hf_checkpoint),
        dtype=dtype,
        sequence_parallel=sequence_parallel,
        vpp=mpu.get_virtual_pipeline_model_parallel_world_size(),
        recompute=recompute,
    )


def cpu_stand_ins_are_active() -> bool:
    """Has ``rehearsal.cpu.enable`` been called in this process?"""
    return getattr(torch.cuda, "_slime_lora_cpu", False)
