"""A tiny checkpoint of every family that the project knows, as its files on the hub are, with random weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from slime_plugins.lora.base.checkpoint import BaseCheckpoint
from slime_plugins.lora.names import LINEARS, megatron_name
from slime_plugins.lora.projections import Projection

HIDDEN = 32
TEXT: dict[str, Any] = dict(
    hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64, max_position_embeddings=64, tie_word_embeddings=False, pad_token_id=0,
)  # fmt: skip
HEADS = dict(head_dim=8)
EXPERTS = 4
MOE = dict(num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=12)
SHARED = MOE | dict(shared_expert_intermediate_size=20)
GDN = dict(
    linear_conv_kernel_dim=4, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
    linear_num_value_heads=4, layer_types=["linear_attention", "full_attention"],
)  # fmt: skip
ROPE = dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5)
MROPE = ROPE | dict(mrope_section=[1, 1, 0], mrope_interleaved=True)
WHOLE_MROPE = MROPE | dict(mrope_section=[2, 1, 1], partial_rotary_factor=1.0)
LATENT = dict(
    q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=EXPERTS,
    num_experts_per_tok=2, moe_intermediate_size=12, n_shared_experts=1, n_group=1, topk_group=1,
    first_k_dense_replace=1, num_key_value_heads=4,
)  # fmt: skip
GLM = dict(
    n_routed_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=12, n_shared_experts=1, n_group=1,
    topk_group=1, first_k_dense_replace=1,
)  # fmt: skip
VISION = dict(depth=1, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)
VISION_3 = VISION | dict(hidden_size=16, intermediate_size=24, out_hidden_size=HIDDEN, num_position_embeddings=16)
VISION_2_5 = VISION | dict(
    hidden_size=16, intermediate_size=24, out_hidden_size=HIDDEN, window_size=16, fullatt_block_indexes=[0]
)
TOKENS = dict(image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63)


def _image(text: dict, vision: dict, **more) -> dict:
    return dict(text_config=text, vision_config=vision, tie_word_embeddings=False) | more


@dataclass(frozen=True)
class Family:
    """One row."""

    config: str
    """Class of its config in transformers."""
    model: str
    """Class of its model."""
    settings: dict[str, Any]
    forms: tuple[str, ...] = ("per-expert",)
    """Of experts, that PEFT reads."""
    spelling: str = "module"
    """In which its adapter is named for that class."""
    files: Callable[[dict], dict] = field(default=lambda tensors: tensors)
    """What its files on the hub have in place of what transformers saves."""


def _stacked(tensors: dict, *, transposed: bool) -> dict:
    """Experts of a layer in one tensor, and layers of multi-token prediction, as the hub's files have them."""
    found, experts = {}, {}
    for name, tensor in tensors.items():
        head, mark, tail = name.partition(".experts.")
        if mark and tail[0].isdigit():
            number, leaf, _ = tail.split(".")
            experts.setdefault(f"{head}{mark}", {})[int(number), leaf] = tensor
        elif mark:
            found[name] = tensor.mT.contiguous() if transposed else tensor
        else:
            found[name] = tensor
    for head, one in experts.items():
        both = [torch.cat([one[e, "gate_proj"], one[e, "up_proj"]]) for e in range(EXPERTS)]
        down = [one[e, "down_proj"] for e in range(EXPERTS)]
        for leaf, parts in (("gate_up_proj", both), ("down_proj", down)):
            found[head + leaf] = torch.stack(parts)
    return found


def _predicting(tensors: dict) -> dict:
    return tensors | {
        "mtp.fc.weight": torch.randn(HIDDEN, 2 * HIDDEN),
        "mtp.layers.0.self_attn.q_proj.weight": torch.randn(64, HIDDEN),
        "mtp.layers.0.mlp.up_proj.weight": torch.randn(48, HIDDEN),
    }


_BOTH = ("per-expert", "fused")
_Q35 = _image(TEXT | HEADS | GDN | dict(rope_parameters=MROPE), VISION_3, **TOKENS)
_Q35_MOE = _image(TEXT | HEADS | GDN | SHARED | dict(rope_parameters=MROPE), VISION_3, **TOKENS)
_VL2 = TEXT | dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[1, 1, 2]))
_VL3 = TEXT | HEADS | dict(rope_parameters=WHOLE_MROPE)
_LLAVA = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=16)
_LLAVA |= dict(patch_size=4, model_type="clip_vision_model")

FAMILIES = {
    "llama": Family("LlamaConfig", "LlamaForCausalLM", TEXT),
    "qwen2": Family("Qwen2Config", "Qwen2ForCausalLM", TEXT),
    "qwen3": Family("Qwen3Config", "Qwen3ForCausalLM", TEXT | HEADS),
    "qwen3_moe": Family("Qwen3MoeConfig", "Qwen3MoeForCausalLM", TEXT | HEADS | MOE, _BOTH),
    "qwen2_moe": Family("Qwen2MoeConfig", "Qwen2MoeForCausalLM", TEXT | SHARED, _BOTH),
    "glm4_moe": Family("Glm4MoeConfig", "Glm4MoeForCausalLM", TEXT | HEADS | GLM, _BOTH),
    "deepseek_v3": Family("DeepseekV3Config", "DeepseekV3ForCausalLM", TEXT | LATENT, _BOTH),
    "deepseek_v3_direct_q": Family(
        "DeepseekV3Config", "DeepseekV3ForCausalLM", TEXT | LATENT | dict(q_lora_rank=None), _BOTH
    ),
    "qwen3_next": Family(
        "Qwen3NextConfig", "Qwen3NextForCausalLM", TEXT | HEADS | SHARED | GDN | dict(rope_parameters=ROPE), _BOTH
    ),
    "qwen3_5_text": Family(
        "Qwen3_5TextConfig", "Qwen3_5ForCausalLM", TEXT | HEADS | GDN | dict(rope_parameters=ROPE), files=_predicting
    ),
    "qwen3_5_moe_text": Family(
        "Qwen3_5MoeTextConfig",
        "Qwen3_5MoeForCausalLM",
        TEXT | HEADS | GDN | SHARED | dict(rope_parameters=ROPE),
        _BOTH,
    ),
    "qwen3_5": Family("Qwen3_5Config", "Qwen3_5ForConditionalGeneration", _Q35, files=_predicting),
    "qwen3_5 as text": Family("Qwen3_5Config", "Qwen3_5ForCausalLM", _Q35, spelling="text"),
    "qwen3_5_moe": Family(
        "Qwen3_5MoeConfig",
        "Qwen3_5MoeForConditionalGeneration",
        _Q35_MOE,
        ("fused",),
        files=lambda tensors: _stacked(tensors, transposed=False),
    ),
    "qwen3_5_moe as text": Family("Qwen3_5MoeConfig", "Qwen3_5MoeForCausalLM", _Q35_MOE, _BOTH, spelling="text"),
    "qwen2_vl": Family(
        "Qwen2VLConfig",
        "Qwen2VLForConditionalGeneration",
        _image(_VL2, VISION | dict(embed_dim=16, hidden_size=HIDDEN, mlp_ratio=2)),
    ),
    "qwen2_5_vl": Family("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration", _image(_VL2, VISION_2_5, **TOKENS)),
    "qwen3_vl": Family(
        "Qwen3VLConfig",
        "Qwen3VLForConditionalGeneration",
        _image(_VL3, VISION_3 | dict(deepstack_visual_indexes=[0])),
    ),
    "qwen3_vl_moe": Family(
        "Qwen3VLMoeConfig",
        "Qwen3VLMoeForConditionalGeneration",
        _image(_VL3 | MOE, VISION_3 | dict(deepstack_visual_indexes=[0])),
        ("fused",),
        files=lambda tensors: _stacked(tensors, transposed=True),
    ),
    "llava": Family(
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        _image(TEXT | dict(model_type="llama", head_dim=8), _LLAVA),
    ),
}


def make(path: Path, name: str, *, text: dict | None = None, vision: dict | None = None) -> Path:
    """The checkpoint directory. ``text``, ``vision``: settings of the two parts of a model that sees images."""
    import transformers

    family = FAMILIES[name]
    settings = dict(family.settings)
    for part, more in (("text_config", text), ("vision_config", vision)):
        if more:
            settings[part] = settings[part] | more
    saved = family.model
    if family.spelling == "text":  # the files are those of the model that sees images
        saved = saved.replace("ForCausalLM", "ForConditionalGeneration")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, saved)(getattr(transformers, family.config)(**settings))
        for tower in ("mlp.gate.weight",):  # tokens should not all go to the same experts
            for key, parameter in model.named_parameters():
                if key.endswith(tower):
                    torch.nn.init.normal_(parameter, std=1.0)
        model.save_pretrained(path)
        tensors = family.files(load_file(path / "model.safetensors"))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    assert config["model_type"]
    return path


def load(path: Path, name: str):
    """The model that users load, of that family."""
    import transformers

    cls = getattr(transformers, FAMILIES[name].model)
    return cls.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


PARTS = [
    ("llama", r"[kqv]_proj", "takes all"),
    ("llama", r"[qv]_proj", "takes all"),
    ("llama", r"q_proj", "refuses 2 of 2"),
    ("llama", r"v_proj|o_proj", "refuses 2 of 4"),
    ("llama", r"[kq]_proj", "refuses 4 of 4"),
    ("llama", r"[kv]_proj", "refuses 4 of 4"),
    ("llama", r"q_proj|1\.self_attn\.v_proj", "refuses 1 of 3"),  # in one of two layers
    ("llama", r"gate_proj|down_proj", "takes all"),
    ("llama", r"up_proj|down_proj", "refuses 2 of 4"),
    ("deepseek_v3", r"q_a_proj|kv_a_proj_with_mqa", "takes all"),
    ("deepseek_v3", r"q_a_proj|o_proj", "refuses 2 of 4"),
    ("deepseek_v3", r"kv_a_proj_with_mqa", "refuses 2 of 2"),
    ("deepseek_v3", r"[qv]_b_proj", "takes all"),
    ("deepseek_v3_direct_q", r"o_proj|kv_b_proj", "takes all"),
    ("deepseek_v3_direct_q", r"\.q_proj|o_proj", "refuses 2 of 4"),
    ("deepseek_v3_direct_q", r"kv_a_proj_with_mqa|o_proj", "refuses 2 of 4"),
    ("qwen3_moe", r"experts.*", "takes all"),
    ("qwen3_moe", r"experts\.[01]\..*", "takes all"),
    ("qwen3_moe", r"experts.*(gate|down)_proj", "takes all"),
    ("qwen3_moe", r"experts.*(up|down)_proj", "refuses 8 of 16"),
    ("qwen3_moe", r"experts.*(gate|up)_proj", "leaves out 16 of 16"),
    ("qwen3_moe", r"experts.*down_proj|o_proj", "leaves out 8 of 10"),
    ("glm4_moe", r"\.experts.*down_proj|0\.mlp\.gate_proj", "takes all"),  # a dense layer's makes room for gate
    ("qwen3_moe", r"mlp\.gate", "refuses 2 of 2"),
    ("qwen3_moe", r"mlp\.gate|o_proj", "refuses 2 of 4"),
    ("deepseek_v3", r"mlp\.gate", "refuses 1 of 1"),
    ("qwen3_5_text", r"in_proj_[ab]|o_proj", "refuses 2 of 3"),
]
"""A family, an adapter on some of its linears, and what SGLang does with it."""


def projections(base: BaseCheckpoint, only: str | None = None) -> list[Projection]:
    """A trained adapter of rank 4 on everything that all-linear adapts; or on what matches an expression, at its end.

    ``only``: of routers and gates too, which are adapted by name alone.
    """
    generator, found = torch.Generator().manual_seed(1), []
    for stored in sorted(base.linears):
        name = base.canonical(stored)
        wanted = _takes(name, base.mla) if only is None else re.search(rf"(?:{only})$", name)
        if base.layer_of(stored) is None or not wanted:
            continue
        rows, columns = base.linear_shape(stored)
        A, B = (torch.randn(*size, generator=generator) * 0.2 for size in ((4, columns), (rows, 4)))
        found.append(Projection(name, A, B, 2.0))
    return found


def _takes(name: str, mla: bool) -> bool:
    try:
        path = megatron_name(name, mla=mla)[0].split(".", 3)[3]
    except KeyError:
        return False
    return not LINEARS[re.sub(r"experts\.\d+\.", "experts.", path)].by_name_only
