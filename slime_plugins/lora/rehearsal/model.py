"""A Hugging Face checkpoint as Megatron-Core GPTModel chunks, at any TP, PP and VPP. Collective: call on all ranks.

Megatron's local spec (no TransformerEngine), so it runs on gloo and on NCCL alike. Shape letters: V vocabulary,
T tensor-parallel size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.base.decoder import HFBase
from slime_plugins.lora.layout import gated_parts, qkv_parts

_LAYER = re.compile(r"decoder\.layers\.\d+\.(.+)")
_NORMS = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",  # TransformerEngine fuses these two
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
}


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm in Megatron's place; its own wrapper refuses sequence parallelism.

    Under SP each rank normalises its own tokens: the mark tells Megatron that the weight's gradient is a partial sum.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_ignored):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 - as Megatron marks it


def build_chunks(
    hf_dir: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    sequence_parallel: bool = False,
    vpp: int | None = None,
    recompute: str | None = None,
    layer_spec: Callable[[HFBase, TransformerConfig], ModuleSpec] | None = None,
    apply: Callable[[list[GPTModel]], object] | None = None,
) -> list[GPTModel]:
    """Build this rank's pipeline chunks and load the base into them. Needs an initialised ``parallel_state``.

    Args:
        dtype: of parameters and activations.
        vpp: chunks per pipeline stage, when ``parallel_state`` was initialised with a virtual size.
        recompute: None, "full" (every layer) or "selective" (core attention).
        layer_spec: of one decoder layer; Megatron's local spec by default.
        apply: called with the list of chunks, the base loaded; the place for ``apply_lora``, before any DDP wrapper.
    Raises:
        UsageError: no checkpoint there, or the model does not split this way.
        ValueError: unsupported architecture, bad files, or a parameter left without a value.
    """
    base = HFBase.read(hf_dir)
    tp = mpu.get_tensor_model_parallel_world_size()
    base.check_parallel(tp=tp, pp=mpu.get_pipeline_model_parallel_world_size(), vpp=vpp)
    config = transformer_config(base, dtype=dtype, sequence_parallel=sequence_parallel, vpp=vpp, recompute=recompute)
    layer = (layer_spec or local_layer_spec)(base, config)
    chunks = [_chunk(base, config, layer, stage if vpp else None) for stage in range(vpp or 1)]
    weights = BaseCheckpoint(base.path)
    for chunk in chunks:
        _mark_shards(chunk)
        load_base(chunk, base, weights)
    for chunk in chunks:
        chunk.to(torch.cuda.current_device())
    if apply is not None:
        apply(chunks)
    return chunks


def _mark_shards(chunk: GPTModel) -> None:
    """Mark sharded weights as Megatron does on initialisation; 0.16.1 forgets to when it is skipped.

    Grad norms and parameter counts go by these marks.
    """
    for module in chunk.modules():
        if not isinstance(module, (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)):
            continue
        dim = 1 if isinstance(module, RowParallelLinear) else 0
        if module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=dim, stride=1)


def transformer_config(
    base: HFBase, *, dtype: torch.dtype, sequence_parallel: bool, vpp: int | None, recompute: str | None
) -> TransformerConfig:
    """Megatron's config of this base under the current parallel state, fused kernels off (a CPU has none)."""
    pp = mpu.get_pipeline_model_parallel_world_size()
    layers_recomputed = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=base.num_layers,
        hidden_size=base.hidden,
        ffn_hidden_size=base.ffn,
        num_attention_heads=base.num_heads,
        num_query_groups=base.num_query_groups,
        kv_channels=base.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=base.norm_eps,
        qk_layernorm=base.qk_norm,
        add_qkv_bias=base.qkv_bias,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=mpu.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=mpu.get_context_parallel_world_size(),
        sequence_parallel=sequence_parallel,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        # The scores are scaled and softmaxed in fp32 as in transformers' eager attention.
        attention_softmax_in_fp32=True,
        # Every value is overwritten by load_base; the initial ones only have to be cheap.
        use_cpu_initialization=True,
        perform_initialization=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        # Pipeline stages exchange activations one after the other: gloo has no batched send/receive.
        batch_p2p_comm=False,
        **(layers_recomputed if recompute == "full" else {"recompute_granularity": recompute}),
    )


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of the embedding in Megatron: each rank holds as many. Extra rows are zero; slice them off the logits."""
    return math.ceil(vocab_size / tp) * tp


def local_layer_spec(base: HFBase, config: TransformerConfig) -> ModuleSpec:
    """A decoder layer of Megatron's own linears."""
    layer = get_gpt_layer_local_spec(qk_layernorm=base.qk_norm, normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    if base.qk_norm:
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer


def _chunk(base: HFBase, config: TransformerConfig, layer: ModuleSpec, vp_stage: int | None) -> GPTModel:
    stage = {"ignore_virtual": False, "vp_stage": vp_stage}
    chunk = GPTModel(
        config,
        TransformerBlockSubmodules([layer] * get_num_layers_to_build(config, vp_stage=vp_stage), layer_norm=RMSNorm),
        vocab_size=padded_vocab_size(base.vocab_size, config.tensor_model_parallel_size),
        max_sequence_length=base.max_positions,
        pre_process=mpu.is_pipeline_first_stage(**stage),
        post_process=mpu.is_pipeline_last_stage(**stage),
        share_embeddings_and_output_weights=base.tied,
        position_embedding_type="rope",
        rotary_base=base.rope_theta,
        vp_stage=vp_stage,
    )
    if base.llama3_rope:
        # Megatron's own rope_scaling has three of the four numbers built in.
        chunk.rotary_pos_emb.inv_freq = llama3_inv_freq(chunk.rotary_pos_emb.inv_freq, **base.llama3_rope)
    return chunk


def llama3_inv_freq(
    inv_freq: torch.Tensor,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> torch.Tensor:
    """Llama 3.1's rotary frequencies: long wavelengths are slowed by ``factor``, short ones kept, a ramp between."""
    turns = original_max_position_embeddings * inv_freq / (2 * math.pi)  # in the original context
    ramp = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return inv_freq * (ramp + (1 - ramp) / factor)


@torch.no_grad()
def load_base(chunk: GPTModel, base: HFBase, weights: BaseCheckpoint) -> None:
    """Fill every parameter of a chunk, not yet adapted, with this rank's shard.

    Raises:
        ValueError: a parameter has no counterpart, or its shape differs from the shard's.
    """
    tp, tp_rank = mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_rank()
    layer_numbers = {f"decoder.layers.{i}": layer.layer_number - 1 for i, layer in enumerate(chunk.decoder.layers)}
    for name, param in chunk.named_parameters():
        match = _LAYER.fullmatch(name)
        if match:
            prefix = f"model.layers.{layer_numbers[name[: match.start(1) - 1]]}."
            shard = _layer_shard(match.group(1), prefix, base, weights, tp, tp_rank)
        elif name == "decoder.final_layernorm.weight":
            shard = weights.read("model.norm.weight")
        elif name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            of_embedding = base.tied or name.startswith("embedding")
            rows = padded_vocab_size(base.vocab_size, tp) // tp
            hf_name = "model.embed_tokens.weight" if of_embedding else "lm_head.weight"
            shard = weights.rows(hf_name, tp_rank * rows, (tp_rank + 1) * rows)
            shard = torch.nn.functional.pad(shard, (0, 0, 0, rows - len(shard)))
        else:
            shard = None
        if shard is None:
            raise ValueError(f"{base.path}: nothing in this checkpoint fills Megatron parameter {name}")
        if shard.shape != param.shape:
            raise ValueError(f"{name}: shape {list(param.shape)}, but the checkpoint gives {list(shard.shape)}")
        param.copy_(shard)


def _layer_shard(
    leaf: str, prefix: str, base: HFBase, weights: BaseCheckpoint, tp: int, tp_rank: int
) -> torch.Tensor | None:
    """This rank's value of one layer parameter, or None for a name that no Hugging Face tensor fills."""

    def shard(name: str, dim: int = 0) -> torch.Tensor:
        return weights.read(prefix + name, dim=dim, part=tp_rank, parts=tp)

    if leaf in _NORMS:
        return weights.read(prefix + _NORMS[leaf])
    if leaf == "self_attention.linear_proj.weight":
        return shard("self_attn.o_proj.weight", dim=1)
    if leaf == "mlp.linear_fc2.weight":
        return shard("mlp.down_proj.weight", dim=1)
    module, _, kind = leaf.rpartition(".")
    if module == "self_attention.linear_qkv":
        parts, parent = qkv_parts(base.num_heads // tp, base.num_query_groups // tp, base.head_dim), "self_attn"
    elif module == "mlp.linear_fc1":
        parts, parent = gated_parts(2 * base.ffn // tp), "mlp"
    else:
        return None
    pieces = [shard(f"{parent}.{part.name}.{kind}") for part in parts]
    fused = torch.empty(sum(part.size for part in parts), *pieces[0].shape[1:], dtype=pieces[0].dtype)
    for part, piece in zip(parts, pieces, strict=True):
        part.put(fused, piece)
    return fused
