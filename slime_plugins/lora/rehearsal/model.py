"""A Hugging Face checkpoint as Megatron-Core GPTModel chunks, at any TP, PP, VPP and EP. Collective over all ranks.

Megatron's local spec (no TransformerEngine), so it runs on gloo and on NCCL alike. Values: ``shards.load_base``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.base.decoder import HFBase
from slime_plugins.lora.base.experts import RoutedExperts
from slime_plugins.lora.rehearsal.shards import load_base, padded_vocab_size


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm in Megatron's place; its own wrapper refuses sequence parallelism.

    Under SP each rank normalises its own tokens: the mark tells Megatron that the weight's gradient is a partial sum.
    Some families multiply by 1 + weight.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_ignored):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 - as Megatron marks it
        self._around_zero = config.layernorm_zero_centered_gamma

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = 1 + self.weight if self._around_zero else self.weight
        return torch.nn.functional.rms_norm(x, self.normalized_shape, weight, self.eps)


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
        layer_spec: of every decoder layer; by default Megatron's local spec of what each layer has.
        apply: called with the list of chunks, the base loaded; the place for ``apply_lora``, before any DDP wrapper.
    Raises:
        UsageError: no checkpoint there, or the model does not split this way.
        ValueError: unsupported architecture, bad files, or a parameter left without a value.
    """
    base = HFBase.read(hf_dir)
    tp = mpu.get_tensor_model_parallel_world_size()
    base.check_parallel(
        tp=tp,
        pp=mpu.get_pipeline_model_parallel_world_size(),
        vpp=vpp,
        ep=mpu.get_expert_model_parallel_world_size(),
        etp=mpu.get_expert_tensor_parallel_world_size(),
        sp=sequence_parallel,
    )
    config = transformer_config(base, dtype=dtype, sequence_parallel=sequence_parallel, vpp=vpp, recompute=recompute)
    if layer_spec is None:
        layers = [local_layer_spec(base, config, number) for number in range(base.num_layers)]
    else:
        layers = [layer_spec(base, config)] * base.num_layers
    chunks = [_chunk(base, config, layers, stage if vpp else None) for stage in range(vpp or 1)]
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
    experts = {} if base.experts is None else _experts_config(base.experts, base.num_layers)
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
        qk_layernorm=base.family.qk_norm,
        add_qkv_bias=base.family.qkv_bias,
        attention_output_gate=base.gated,
        layernorm_zero_centered_gamma=base.gated,
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
        **experts,
        **(layers_recomputed if recompute == "full" else {"recompute_granularity": recompute}),
    )


def _experts_config(experts: RoutedExperts, num_layers: int) -> dict[str, Any]:
    # 0.16.1 reads this where there is no TransformerEngine, and has not set it.
    moe_utils.__dict__.setdefault("te_general_gemm", None)
    config: dict[str, Any] = {
        "num_moe_experts": experts.count,
        "moe_router_topk": experts.top_k,
        "moe_ffn_hidden_size": experts.ffn,
        "moe_layer_freq": [int(experts.is_sparse(number)) for number in range(num_layers)],
        # The base is frozen: nothing would balance its router.
        "moe_router_load_balancing_type": "none",
        "moe_router_pre_softmax": not experts.renormalised,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": False,
        "expert_model_parallel_size": mpu.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": mpu.get_expert_tensor_parallel_world_size(),
    }
    if experts.shared_ffn:
        config |= {"moe_shared_expert_intermediate_size": experts.shared_ffn, "moe_shared_expert_gate": True}
    return config


def local_layer_spec(base: HFBase, config: TransformerConfig, number: int = 0) -> ModuleSpec:
    """The decoder layer of this number (from 0), of Megatron's own linears."""
    experts = {"num_experts": config.num_moe_experts} if base.has_experts(number) else {}
    layer = get_gpt_layer_local_spec(qk_layernorm=base.family.qk_norm, normalization="RMSNorm", **experts)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    if base.has_linear_attention(number):
        from slime_plugins.lora.rehearsal.linear_attention import LinearAttention

        layer.submodules.self_attention = ModuleSpec(LinearAttention, params={"hf_dir": base.path})
    elif base.family.qk_norm:
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer


def _chunk(base: HFBase, config: TransformerConfig, layers: list[ModuleSpec], vp_stage: int | None) -> GPTModel:
    """``layers``: of the whole model."""
    stage = {"ignore_virtual": False, "vp_stage": vp_stage}
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    mine = layers[first : first + get_num_layers_to_build(config, vp_stage=vp_stage)]
    chunk = GPTModel(
        config,
        TransformerBlockSubmodules(mine, layer_norm=RMSNorm),
        vocab_size=padded_vocab_size(base.vocab_size, config.tensor_model_parallel_size),
        max_sequence_length=base.max_positions,
        pre_process=mpu.is_pipeline_first_stage(**stage),
        post_process=mpu.is_pipeline_last_stage(**stage),
        share_embeddings_and_output_weights=base.tied,
        position_embedding_type="rope",
        rotary_base=base.rope_theta,
        rotary_percent=base.rotary_share,
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
