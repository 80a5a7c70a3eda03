"""Seconds per training step of a model with 64 experts: frozen, LoRA on every expert, and LoRA as a loop over experts.

    python bench/experts.py                            64 experts, 8 of them per token; a few minutes
    python bench/experts.py --tokens 256 --rank 8      few rows per expert

frozen     the experts as Megatron's SequentialMLP runs them; gradients flow to the input of every layer
lora       this project: one stacked adapter for all experts of a linear, grouped low-rank products
loop       the same adapters one by one, a LoRA linear inside each of the 64 small MLPs

The model is Qwen3-30B-A3B's proportions at half its width, without attention: layers of experts alone, so that
nothing dilutes the ratio. The forms take turns; ratios are medians over rounds, as in step_time.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from pathlib import Path

import torch
from _harness import (
    Setting,
    Trainer,
    add_lora,
    build_model,
    cpu_shapes,
    freeze,
    paired_ratio,
    require_grad,
    run_ranks,
    table,
    take_turns,
    write_json,
)

TARGET = 1.15
"""The step with stacked adapters over the frozen one that this project aims at."""
FORMS = ("frozen", "lora", "loop")


def main() -> int:
    args = parse_args()
    (found,) = run_ranks(measure, Setting(1, False), args)
    seconds = found["seconds"]["cpu"]
    medians = {form: statistics.median(seconds[form]) for form in FORMS}
    ratios = {form: paired_ratio(seconds[form], seconds["frozen"]) for form in FORMS[1:]}
    rows = [("frozen", f"{found['trainable']['frozen']:,}", f"{medians['frozen']:.3f}", "1", "", "")]
    for form, ratio in ratios.items():
        quartiles = f"{ratio['quartile_1']:.3f}-{ratio['quartile_3']:.3f}"
        trainable = f"{found['trainable'][form]:,}"
        rows.append((form, trainable, f"{medians[form]:.3f}", f"{ratio['median']:.3f}", quartiles, f"{TARGET}"))
    print(
        f"{args.layers} layers, {args.experts} experts, {args.topk} per token, hidden {args.hidden}, expert ffn "
        f"{args.expert_ffn}, {args.tokens} tokens, rank {args.rank}, {args.layout}; processor time"
    )
    print(table(("form", "trainable", "s per step", "over frozen", "quartiles", "target"), rows))
    content = {
        **{k: v for k, v in vars(args).items() if k != "json"},
        "median_seconds": medians,
        "over_frozen": ratios,
    }
    print(write_json("experts.json", content, args.json))
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 1024), ("expert-ffn", 384), ("experts", 64), ("topk", 8), ("layers", 2)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--tokens", type=int, default=1024, help="default: 1024, 128 rows an expert on average")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default: 16)")
    parser.add_argument("--layout", choices=("fused", "split"), default="fused")
    parser.add_argument("--rounds", type=int, default=12, help="measured rounds (default: 12)")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: bench/out/experts.json")
    return parser.parse_args()


def measure(setting: Setting, args: argparse.Namespace) -> dict:
    trainers = {form: trainer_of(form, setting, args) for form in FORMS}
    check_equal(trainers["lora"], trainers["loop"])
    seconds = take_turns(trainers, args.rounds, args.warmup)
    return {"seconds": seconds, "trainable": {form: t.trainable for form, t in trainers.items()}}


def trainer_of(form: str, setting: Setting, args: argparse.Namespace) -> Trainer:
    model = model_of(setting, args)
    if form == "frozen":
        freeze(model)
    else:
        add_lora(
            model, rank=args.rank, layout=args.layout, target_modules=("experts.linear_fc1", "experts.linear_fc2")
        )
    if form == "loop":
        unstack(model)
    model.embedding.register_forward_hook(require_grad)
    return Trainer(model, VOCAB, args.tokens)


VOCAB = 1024


def model_of(setting: Setting, args: argparse.Namespace) -> torch.nn.Module:
    """A GPTModel whose layers are routed experts and nothing else."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    from slime_plugins.lora.rehearsal.model import RMSNorm

    moe_utils.__dict__.setdefault("te_general_gemm", None)  # which 0.16.1 reads without TE, and has not set
    experts = get_moe_module_spec(use_te=False, num_experts=args.experts, moe_grouped_gemm=False)
    parts = TransformerLayerSubmodules(pre_mlp_layernorm=RMSNorm, mlp=experts, mlp_bda=get_bias_dropout_add)
    shapes = cpu_shapes(args.hidden, num_layers=args.layers, tokens=args.tokens)
    return build_model(
        dataclasses.replace(shapes, vocab_size=VOCAB),
        setting,
        lambda base, config: ModuleSpec(module=TransformerLayer, submodules=parts),
        num_moe_experts=args.experts,
        moe_router_topk=args.topk,
        moe_ffn_hidden_size=args.expert_ffn,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
    )


def unstack(model: torch.nn.Module) -> None:
    """Take the stacked adapters apart: each expert's linear gets the LoRA form of an ordinary linear."""
    from megatron.core.transformer.moe.experts import SequentialMLP

    from slime_plugins.lora.adapters import iter_adapters
    from slime_plugins.lora.layers import adapt, frozen_of, kind_of

    for stacked in list(iter_adapters(model)):
        for i, (spec, linear) in enumerate(zip(stacked.lora.one_by_one(), stacked.linears)):
            adapt(linear, kind_of(linear).form, frozen_of(linear), spec, None)
            linear.lora_A.data.copy_(stacked.lora_A[i])
            linear.lora_B.data.copy_(stacked.lora_B[i])
    for module in model.modules():
        if isinstance(module, SequentialMLP):
            module.__class__ = SequentialMLP
            for leaf in ("linear_fc1", "linear_fc2"):
                del module._modules[leaf]


def check_equal(one: Trainer, other: Trainer) -> None:
    """The two forms of LoRA are one model."""
    with torch.no_grad():
        a, b = one.forward().item(), other.forward().item()
    if abs(a - b) > 1e-5 * abs(a):
        raise SystemExit(f"error: the loop over experts computes another model: loss {b}, not {a}")


if __name__ == "__main__":
    sys.exit(main())
