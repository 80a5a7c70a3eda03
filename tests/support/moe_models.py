"""Tiny models with routed experts: a Hugging Face checkpoint, and the same base as Megatron chunks on every rank.

``qwen3_moe``, ``qwen2_moe`` (shared expert with a gate), ``glm4_moe`` (dense first layer, sigmoid router, shared
expert), ``deepseek_v3`` (the same with MLA), ``qwen3_next`` and ``qwen3_5_moe_text`` (a layer of linear attention,
then one of gated attention, norms around 0). ``qwen3_5_text`` is the last one without experts, ``qwen3_5`` that one
with a vision tower (see ``vision_model``), and ``qwen3_5_moe`` the one with experts and a tower.
Weights are cut by hand here, not by the code under test.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import vision_model
from safetensors.torch import load_file

VOCAB, HIDDEN, HEADS, GROUPS, HEAD_DIM = 96, 40, 4, 2, 12
FFN, EXPERT_FFN, SHARED_FFN, EXPERTS, TOPK = 56, 20, 24, 8, 2
MLA = {"q_lora_rank": 28, "kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 10}
FAMILIES = ("qwen3_moe", "qwen2_moe", "glm4_moe", "deepseek_v3", "qwen3_next", "qwen3_5_moe_text")
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 6}
LINEAR |= {"linear_conv_kernel_dim": 4}
WITH_LINEAR = ("qwen3_next", "qwen3_5_moe_text", "qwen3_5_moe", "qwen3_5_text", "qwen3_5")
SEES_IMAGES = ("qwen3_5", "qwen3_5_moe")


@contextlib.contextmanager
def sizes(**sizes):
    """Inside, models are made in these sizes (``HIDDEN=192``) instead of the module's."""
    before = {name: globals()[name] for name in sizes}
    globals().update(sizes)
    try:
        yield
    finally:
        globals().update(before)


def make_checkpoint(path: Path, family: str, *, unused_experts: tuple[int, ...] = (), seed: int = 0) -> Path:
    """Write a random checkpoint. ``unused_experts``: never chosen by a router with a selection bias."""
    import transformers

    common = dict(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_attention_heads=HEADS,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.15,
        num_experts_per_tok=TOPK,
        moe_intermediate_size=EXPERT_FFN,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    sigmoid = dict(n_routed_experts=EXPERTS, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1)
    sigmoid |= dict(norm_topk_prob=True, routed_scaling_factor=1.5, num_hidden_layers=4)
    gqa = dict(num_key_value_heads=GROUPS, head_dim=HEAD_DIM)
    if family == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(
            **common, **gqa, num_experts=EXPERTS, norm_topk_prob=True, num_hidden_layers=2
        )
    elif family == "qwen2_moe":
        common |= dict(shared_expert_intermediate_size=SHARED_FFN, num_key_value_heads=GROUPS, num_hidden_layers=2)
        config = transformers.Qwen2MoeConfig(**common, num_experts=EXPERTS, norm_topk_prob=False)
    elif family in WITH_LINEAR:
        common["rope_parameters"] |= {"partial_rotary_factor": 1.0}
        common |= LINEAR | dict(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
        if family != "qwen3_next":
            common["rope_parameters"] |= {"mrope_section": [HEAD_DIM // 6] * 3}
        if family in ("qwen3_5_text", "qwen3_5"):
            del common["num_experts_per_tok"], common["moe_intermediate_size"]
            config = transformers.Qwen3_5TextConfig(**common, **gqa)
        else:
            common |= dict(shared_expert_intermediate_size=SHARED_FFN, num_experts=EXPERTS, norm_topk_prob=True)
            made = transformers.Qwen3NextConfig if family == "qwen3_next" else transformers.Qwen3_5MoeTextConfig
            config = made(**common, **gqa)
        if family in SEES_IMAGES:
            config = vision_model.config(config)
    elif family == "glm4_moe":
        config = transformers.Glm4MoeConfig(**common, **gqa, **sigmoid, use_qk_norm=True, partial_rotary_factor=1.0)
    else:
        config = transformers.DeepseekV3Config(**common, **MLA, **sigmoid, num_key_value_heads=HEADS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        auto = transformers.AutoModelForImageTextToText if family in SEES_IMAGES else transformers.AutoModelForCausalLM
        model = auto.from_config(config)
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if "norm" in name or name.endswith(".bias"):
                    tensor.add_(0.2 * torch.randn_like(tensor))
                if name.endswith("e_score_correction_bias"):
                    tensor.add_(0.1 * torch.randn_like(tensor))
                    tensor[list(unused_experts)] = -10.0
    model.save_pretrained(path)
    return path


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    """The checkpoint by its names, experts that lie stacked in it one by one (``mlp.experts.7.gate_proj.weight``)."""
    weights = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        experts, _, leaf = name.rpartition(".")
        if not experts.endswith(".mlp.experts"):
            weights[name] = tensor
            continue
        leaves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        for expert, matrix in enumerate(tensor):  # [out, in]
            for one, rows in zip(leaves, matrix.chunk(len(leaves)), strict=True):
                weights[f"{experts}.{expert}.{one}.weight"] = rows.contiguous()
    return weights


def linears(path: Path) -> dict[str, tuple[int, int]]:
    """Hugging Face name -> [out, in] of what all-linear adapts."""
    shapes = {name: tuple(t.shape) for name, t in weights_of(path).items()}
    skipped = ("gate.weight", "shared_expert_gate.weight", "in_proj_a.weight", "in_proj_b.weight", "in_proj_ba.weight")
    return {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if len(shape) == 2 and ".layers." in name and ".visual." not in name and not name.endswith(skipped)
    }


def num_parameters(path: Path) -> int:
    """Of the base, without the router's selection bias, which Megatron holds as a buffer."""
    tensors = load_file(path / "model.safetensors")
    return sum(t.numel() for name, t in tensors.items() if not name.endswith("e_score_correction_bias"))


def transformer_config(hf: dict, **overrides):
    """Megatron's config under the current parallel state, fused kernels off."""
    from megatron.core import parallel_state as mpu
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    mla, sigmoid = "kv_lora_rank" in hf, "n_routed_experts" in hf
    shared = {}
    around_zero, dense = hf["model_type"] in WITH_LINEAR, hf["model_type"] == "qwen3_5_text"
    if hf["model_type"] == "qwen2_moe" or (around_zero and not dense):
        shared = dict(moe_shared_expert_intermediate_size=SHARED_FFN, moe_shared_expert_gate=True)
    elif sigmoid:
        shared = dict(moe_shared_expert_intermediate_size=EXPERT_FFN)
    router = dict(moe_router_pre_softmax=not hf.get("norm_topk_prob", True))
    if sigmoid:
        router = dict(
            moe_router_score_function="sigmoid",
            moe_router_enable_expert_bias=True,
            moe_router_topk_scaling_factor=hf["routed_scaling_factor"],
        )
    latent = {}
    if mla:
        latent = dict(
            q_lora_rank=hf["q_lora_rank"],
            kv_lora_rank=hf["kv_lora_rank"],
            qk_head_dim=hf["qk_nope_head_dim"],
            qk_pos_emb_head_dim=hf["qk_rope_head_dim"],
            v_head_dim=hf["v_head_dim"],
            rope_type="rope",
            rotary_scaling_factor=1.0,
        )
    settings = dict(
        num_layers=hf["num_hidden_layers"],
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=HEADS,
        num_query_groups=HEADS if mla else GROUPS,
        kv_channels=hf["v_head_dim"] if mla else hf.get("head_dim") or HIDDEN // HEADS,
        normalization="RMSNorm",
        layernorm_epsilon=hf["rms_norm_eps"],
        qk_layernorm=mla or around_zero or hf["model_type"] in ("qwen3_moe", "glm4_moe"),
        attention_output_gate=around_zero,
        layernorm_zero_centered_gamma=around_zero,
        add_qkv_bias=hf["model_type"] == "qwen2_moe",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        num_moe_experts=None if dense else EXPERTS,
        moe_router_topk=TOPK,
        moe_ffn_hidden_size=None if dense else EXPERT_FFN,
        moe_layer_freq=[
            int(not dense and i >= hf.get("first_k_dense_replace", 0)) for i in range(hf["num_hidden_layers"])
        ],
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=False,
        tensor_model_parallel_size=mpu.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=mpu.get_pipeline_model_parallel_world_size(),
        expert_model_parallel_size=mpu.get_expert_model_parallel_world_size(),
        expert_tensor_parallel_size=mpu.get_expert_tensor_parallel_world_size(),
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        attention_softmax_in_fp32=True,
        use_cpu_initialization=True,
        perform_initialization=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        batch_p2p_comm=False,
    )
    settings |= shared | router | latent | overrides
    return (MLATransformerConfig if mla else TransformerConfig)(**settings)


class Attention(torch.nn.Module):
    """softmax(q k^T) v with heads of different sizes for keys and values, which Megatron's local attention lacks."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, **_ignored):
        super().__init__()
        self.scale = softmax_scale

    def forward(self, query, key, value, attention_mask, **_ignored):
        """[s, b, heads, d] each; groups of query heads share a key and value head. Returns [s, b, heads * d_v]."""
        repeat = query.shape[2] // key.shape[2]
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, *(x.repeat_interleave(repeat, 2) for x in (key, value))))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return out.permute(2, 0, 1, 3).flatten(2)


def layer_specs(config, te: bool, hf_dir) -> list:
    """One spec per decoder layer: dense or with experts, of Megatron's own or of TE's linears."""
    from linear_attention import LinearAttention, is_linear
    from megatron.core.models.gpt import gpt_layer_specs as specs
    from megatron.core.transformer.spec_utils import ModuleSpec

    from slime_plugins.lora.rehearsal.model import RMSNorm

    common = dict(
        qk_layernorm=config.qk_layernorm, multi_latent_attention=getattr(config, "multi_latent_attention", False)
    )
    layers = []
    for with_experts in config.moe_layer_freq:
        experts = dict(num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm)
        experts = experts if with_experts else {}
        if te:
            layer = specs.get_gpt_layer_with_transformer_engine_spec(**common, **experts)
        else:
            layer = specs.get_gpt_layer_local_spec(**common, **experts, normalization="RMSNorm")
            for owner in (layer.submodules, layer.submodules.self_attention.submodules):
                for name in vars(owner):
                    if name.endswith("layernorm") and "Norm" in getattr(getattr(owner, name), "__name__", ""):
                        setattr(owner, name, RMSNorm)
        layer.submodules.self_attention.submodules.core_attention = Attention
        if is_linear(hf_dir)[len(layers) : len(layers) + 1] == [True]:
            layer.submodules.self_attention = ModuleSpec(LinearAttention, params=dict(hf_dir=hf_dir, norm=te))
        layers.append(layer)
    return layers


def build_chunks(hf_dir, *, te=False, apply: Callable | None = None, **overrides) -> list:
    """This rank's GPTModel chunk with the base in it. ``overrides`` of the TransformerConfig."""
    from megatron.core import parallel_state as mpu
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from slime_plugins.lora.rehearsal.model import RMSNorm

    moe_utils.__dict__.setdefault("te_general_gemm", None)  # which 0.16.1 reads without TE, and has not set
    hf = json.loads(Path(hf_dir, "config.json").read_text())
    sees_images = "vision_config" in hf
    hf = hf.get("text_config", hf)
    config = transformer_config(hf, **overrides)
    config.transformer_impl_is_te = te
    first = get_transformer_layer_offset(config)
    specs = layer_specs(config, te, hf_dir)[first : first + get_num_layers_to_build(config)]

    class NormAroundZero(RMSNorm):
        def forward(self, x):
            return torch.nn.functional.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)

    norm = NormAroundZero if config.layernorm_zero_centered_gamma else RMSNorm
    chunk = GPTModel(
        config,
        TransformerBlockSubmodules(specs, layer_norm=norm),
        vocab_size=VOCAB,
        max_sequence_length=256,
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=10000.0,
        scatter_embedding_sequence_parallel=not sees_images,
    )
    weights = weights_of(Path(hf_dir))
    weights = {name.replace("model.language_model.", "model."): weight for name, weight in weights.items()}
    _load(chunk, weights, config)
    if sees_images:
        chunk = vision_model.WithTower(chunk, hf_dir, weights)
    if apply is not None:
        apply([chunk])
    return [chunk]


@dataclass(frozen=True)
class _Cut:
    """This rank's position on one axis."""

    rank: int
    size: int

    def of(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor.chunk(self.size, dim)[self.rank]


_NORMS = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight", "self_attn.q_a_layernorm.weight"),
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "self_attention.kv_layernorm.weight": "self_attn.kv_a_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attn.q_a_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attn.kv_a_layernorm.weight",
}
_LATENT = {  # -> name, sharded dimension of Megatron's own linear, and of TE's
    "linear_q_down_proj": ("q_a_proj", 0, None),
    "linear_q_up_proj": ("q_b_proj", 0, 0),
    "linear_kv_down_proj": ("kv_a_proj_with_mqa", 0, None),
    "linear_kv_up_proj": ("kv_b_proj", 0, 0),
}


@torch.no_grad()
def _load(chunk, weights: dict[str, torch.Tensor], config) -> None:
    from megatron.core import parallel_state as mpu

    tp = _Cut(mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size())
    etp = _Cut(mpu.get_expert_tensor_parallel_rank(), mpu.get_expert_tensor_parallel_world_size())
    first_expert = mpu.get_expert_model_parallel_rank() * EXPERTS // mpu.get_expert_model_parallel_world_size()
    tensors = dict(chunk.named_parameters())
    tensors |= {name: b for name, b in chunk.named_buffers() if name.endswith("router.expert_bias")}
    for name, tensor in tensors.items():
        value = None
        if ".layers." in name:
            layer = chunk.decoder.layers[int(name.split(".")[2])].layer_number - 1
            leaf = name.split(".", 3)[3]
            value = _layer_value(leaf, f"model.layers.{layer}.", weights, config, tp, etp, first_expert)
        elif name == "decoder.final_layernorm.weight":
            value = weights["model.norm.weight"]
        elif name == "embedding.word_embeddings.weight":
            value = tp.of(weights["model.embed_tokens.weight"], 0)
        elif name == "output_layer.weight":
            value = tp.of(weights["lm_head.weight"], 0)
        assert value is not None and value.shape == tensor.shape, (name, tensor.shape, value is None or value.shape)
        tensor.copy_(value)


def _layer_value(leaf: str, prefix: str, weights, config, tp: _Cut, etp: _Cut, first_expert: int):
    if leaf in _NORMS:
        names = _NORMS[leaf] if isinstance(_NORMS[leaf], tuple) else (_NORMS[leaf],)
        return next(weights[prefix + name] for name in names if prefix + name in weights)
    if leaf == "self_attention.input_layernorm.weight" or ".linear_attn." in leaf:
        return weights[prefix + leaf.removeprefix("self_attention.")]
    if leaf == "mlp.router.weight":
        return weights[prefix + "mlp.gate.weight"]
    if leaf == "mlp.router.expert_bias":
        return weights[prefix + "mlp.gate.e_score_correction_bias"]
    if leaf == "mlp.shared_experts.gate_weight":
        return weights[prefix + "mlp.shared_expert_gate.weight"]
    if leaf == "self_attention.linear_proj.weight":
        return tp.of(weights[prefix + "self_attn.o_proj.weight"], 1)
    module, kind = leaf.rsplit(".", 1)
    if module == "self_attention.linear_qkv":
        q, k, v = (weights[f"{prefix}self_attn.{p}_proj.{kind}"] for p in "qkv")
        d, rest = config.kv_channels, q.shape[1:]
        if config.attention_output_gate:  # a query and a gate per head; in Megatron all of a group's queries first
            q = q.view(GROUPS, HEADS // GROUPS, 2, d, *rest).transpose(1, 2)
        grouped = [t.reshape(GROUPS, -1, d, *rest) for t in (q, k, v)]
        return tp.of(torch.cat(grouped, 1).flatten(0, 2), 0)
    if module.split(".")[-1] in _LATENT:
        name, dim, te_dim = _LATENT[module.split(".")[-1]]
        weight = weights[f"{prefix}self_attn.{name}.weight"]
        duplicated = te_dim is None and config.transformer_impl_is_te
        return weight if duplicated else tp.of(weight, dim)
    parent, cut = module.rsplit(".", 1)[0], tp
    if module.startswith("mlp.experts.linear") and kind == "weight":  # TE's single weight of all experts
        names = [f"{module}.weight{i}" for i in range(EXPERTS // config.expert_model_parallel_size)]
        return torch.stack([_layer_value(name, prefix, weights, config, tp, etp, first_expert) for name in names])
    if ".experts" in module:
        # mlp.experts.linear_fc1.weight3, or mlp.experts.local_experts.3.linear_fc1.weight
        local = int(kind.removeprefix("weight") or module.split(".")[3])
        parent, cut = f"mlp.experts.{first_expert + local}", etp
    if parent == "mlp.shared_experts" and prefix + "mlp.shared_expert.up_proj.weight" in weights:
        parent = "mlp.shared_expert"
    if module.endswith("linear_fc2"):
        return cut.of(weights[f"{prefix}{parent}.down_proj.weight"], 1)
    return torch.cat([cut.of(weights[f"{prefix}{parent}.{leaf}_proj.weight"], 0) for leaf in ("gate", "up")])
