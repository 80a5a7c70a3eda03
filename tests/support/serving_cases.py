"""Families and target sets, each through SGLang's own code: what is served, and what is refused at launch by us."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import moe_models
import torch
from packaging.version import Version
from sglang_worker import Worker

from slime_plugins.lora.peft.form import to_peft
from slime_plugins.lora.projections import Projection
from slime_plugins.lora.slime.hooks import launch as hooks
from slime_plugins.lora.slime.hooks.refusal import Launch, Refusal, adapted_linears
from slime_plugins.lora.slime.hooks.refusals import refused
from slime_plugins.lora.slime.hooks.serving import projections

FAMILIES = {
    "Llama, Qwen2.5, Qwen3": "qwen3",
    "Qwen3-MoE": "qwen3_moe",
    "Qwen2-MoE": "qwen2_moe",
    "GLM-4.5": "glm4_moe",
    "DeepSeek-V3, Kimi-K2": "deepseek_v3",
    "DeepSeek-V2-Lite, Moonlight (no q-LoRA)": "deepseek_v3_direct_q",
    "Qwen3-Next": "qwen3_next",
}
"""As users call them, and the checkpoint that stands for them here."""
ATTENTION = (
    "linear_qkv linear_proj linear_q_proj linear_q_down_proj linear_q_up_proj linear_kv_down_proj linear_kv_up_proj"
)
TARGETS = {
    "all-linear": "all-linear",
    "attention": ATTENTION,
    "q_proj, v_proj": "q_proj v_proj",
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "o_proj": "o_proj",
    "q_a_proj": "q_a_proj",
    "kv_a_proj_with_mqa": "kv_a_proj_with_mqa",
    "q_b_proj, kv_b_proj": "q_b_proj kv_b_proj",
    "gate_proj": "gate_proj",
    "up_proj": "up_proj",
    "down_proj": "down_proj",
    "experts": "experts.linear_fc1 experts.linear_fc2",
    "experts.linear_fc1": "experts.linear_fc1",
    "experts.linear_fc2": "experts.linear_fc2",
    "shared_experts": "shared_experts.linear_fc1 shared_experts.linear_fc2",
}
RANK = 4


@dataclass
class Outcome:
    """One cell of the table."""

    refusals: list[Refusal]
    """Rows of ours that hold."""
    trouble: str | None
    """What SGLang's code said or did instead of serving; None where it serves every projection."""


def base(root: Path, family: str) -> Path:
    """A tiny checkpoint of a family."""
    path = root / family
    if path.is_dir():
        return path
    if family == "qwen3":
        import transformers

        config = transformers.Qwen3Config(
            vocab_size=96, hidden_size=40, intermediate_size=56, num_attention_heads=4, num_key_value_heads=2,
            head_dim=12, num_hidden_layers=2,
        )  # fmt: skip
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    elif family.startswith("deepseek_v3"):
        import transformers

        moe_models.make_checkpoint(path, "deepseek_v3")
        config = transformers.AutoConfig.from_pretrained(path)
        # Not the width of kv_a_proj_with_mqa: SGLang takes one's shape for the other's where one is missing.
        config.q_lora_rank = None if family.endswith("direct_q") else 20
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    else:
        moe_models.make_checkpoint(path, family)
    return path


def arguments(hf_dir: Path, *words: str) -> argparse.Namespace:
    """slime's arguments for this base, as far as a launch looks at them, and the LoRA flags."""
    config = json.loads((hf_dir / "config.json").read_text())
    parser = argparse.ArgumentParser()
    hooks.flags(lambda: lambda given: given)()(parser)
    args = parser.parse_args(["--use-lora", "--lora-sync", "adapter", *words])
    counts = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((config[name] for name in counts if config.get(name)), None)
    shared = config.get("shared_expert_intermediate_size")
    if config.get("n_shared_experts"):
        shared = config["n_shared_experts"] * config["moe_intermediate_size"]
    for name, value in dict(
        hf_checkpoint=str(hf_dir), num_layers=config["num_hidden_layers"], num_experts=experts,
        multi_latent_attention=bool(config.get("kv_lora_rank")), q_lora_rank=config.get("q_lora_rank"),
        moe_shared_expert_intermediate_size=shared, colocate=True, load=None,
    ).items():  # fmt: skip
        setattr(args, name, value)
    return args


def adapter_of(args: argparse.Namespace, hf_dir: Path, seed: int = 0) -> list[Projection]:
    """Random adapters of what the flags target, as far as the base has it."""
    shapes = moe_models.linears(hf_dir)
    wanted: dict[str, None] = {}
    for layer, path, leaves in adapted_linears(args):
        parent = path.replace("self_attention", "self_attn").rsplit(".", 1)[0]
        for name in shapes:
            plain = name.replace("shared_expert.", "shared_experts.")
            *front, leaf = plain.split(".")
            if front[-1].isdigit():
                front.pop()
            if ".".join(front) == f"model.layers.{layer}.{parent}" and leaf in leaves:
                wanted[name] = None
    generator = torch.Generator().manual_seed(seed)
    return [
        Projection(
            name.replace("shared_expert.", "shared_experts."),
            torch.randn(RANK, shapes[name][1], generator=generator),
            torch.randn(shapes[name][0], RANK, generator=generator),
            2.0,
        )
        for name in wanted
    ]


def outcome(root: Path, version: str, family: str, targets: str, *, tp: int = 1, fused_shared=False) -> Outcome | None:
    """What becomes of one cell; None where the family has no such linears."""
    hf_dir = base(root, family)
    args = arguments(hf_dir, "--lora-r", str(RANK), "--lora-target-modules", *targets.split())
    adapters = adapter_of(args, hf_dir)
    if not adapters:
        return None
    rows = refused(Launch(args, Version(version)))
    problem = None
    for rank in range(tp):
        problem = problem or _serve(args, hf_dir, version, adapters, tp, rank, fused_shared)
    return Outcome(rows, problem)


def _serve(args, hf_dir, version, adapters, tp, rank, fused_shared) -> str | None:
    config, tensors = to_peft(adapters, hf_dir)
    leaves = args.sglang_lora_target_modules if hasattr(args, "sglang_lora_target_modules") else projections(args)
    try:
        worker = Worker(version, hf_dir, leaves, RANK, tp=tp, rank=rank, fused_shared=fused_shared)
        worker.load("slime-x-v1", config, tensors)
        worker.generate("slime-x-v1")
        served = worker.served("slime-x-v1")
    except AssertionError as error:
        if "nothing stands for it here" in str(error):
            raise
        return f"AssertionError: {error}"
    except Exception as error:  # noqa: BLE001 - whatever theirs raises is the finding
        return f"{type(error).__name__}: {error}"
    for adapter in adapters:
        name = adapter.name
        if name not in served:
            name = name.replace("shared_experts.", "shared_expert.")
        if name not in served:
            return f"dropped in silence: {adapter.name}"
        expected = adapter.update()
        if tp == 1 and (served[name].shape != expected.shape or not _close(served[name], expected)):
            return f"served wrong: {adapter.name}"
        if tp > 1 and not any(_close(served[name], part) for part in _shards(expected, served[name].shape, tp, rank)):
            return f"served wrong at rank {rank}: {adapter.name}"
    return None


def _shards(update: torch.Tensor, shape: torch.Size, tp: int, rank: int) -> list[torch.Tensor]:
    """This rank's rows, its columns, or all of it: whichever has the shape that is served."""
    parts = [update, *(update.chunk(tp, dim)[rank] for dim in (0, 1) if update.shape[dim] % tp == 0)]
    return [part for part in parts if part.shape == shape]


def _close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """To bf16's rounding of A and B."""
    return bool((got - expected).abs().max() <= 0.02 * expected.abs().max())
