"""``slime-lora plan``: argument text and printing; the arithmetic is in ``cost``."""

from __future__ import annotations

import argparse
import dataclasses
import json

from slime_plugins.lora.arguments import add_lora_arguments
from slime_plugins.lora.base.quantization import BaseQuant, check_flags
from slime_plugins.lora.cli import plan_compare
from slime_plugins.lora.config import LoRAConfig

NAME = "plan"
HELP = "What a LoRA run will cost: parameters, GPU memory by part, bytes per weight sync. From config.json alone."
EPILOG = """\
Activations are counted where --tokens says how many tokens a GPU has at a time, then with full recompute; and with
--compare, with every kind of recompute. The kinds are Megatron's --recompute-granularity: full (every layer, uniform,
1), selective (core attention, of which flash attention leaves next to nothing), none. The parts in a comparison are
those under full recompute. Experts are taken to receive equal shares of the tokens. Not counted: CUDA and NCCL (some
GB), fragmentation, rollout engines on the same GPU, multi-token prediction.

examples:
  slime-lora plan --hf-checkpoint Qwen3-4B --tp 2 --dp 4 --lora-r 32 --lora-alpha 32
  slime-lora plan --hf-checkpoint Qwen3-4B --lora-target-modules q_proj v_proj --lora-layout split
  slime-lora plan --hf-checkpoint Qwen3-32B --dp 8 --lora-r 8 --lora-base-quant nf4 --tokens 2048 \\
      --lora-target-modules q_proj k_proj v_proj o_proj
  slime-lora plan --hf-checkpoint Qwen3-4B --tp 2 --json | jq .lora.total
  slime-lora plan --compare --hf-checkpoint Qwen3-4B Qwen3-8B --tp 2 --dp 4 --tokens 9216 --png plan.png
  slime-lora plan --compare --hf-checkpoint Qwen3-30B-A3B --tp 4 --dp 2 --ep 8 --etp 1
"""


_RANKS = {
    "tp": "tensor-parallel ranks",
    "pp": "pipeline stages",
    "dp": "data-parallel ranks, those of context parallelism included",
    "ep": "expert-parallel ranks",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hf-checkpoint",
        required=True,
        nargs="+",
        metavar="DIR",
        help="its config.json is all that is read; several with --compare",
    )
    for flag, what in _RANKS.items():
        parser.add_argument(f"--{flag}", type=int, default=1, metavar="N", help=f"{what} (default: 1)")
    parser.add_argument("--etp", type=int, metavar="N", help="expert-tensor-parallel ranks (default: those of --tp)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the base (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="bytes and counts as one JSON object")
    plan_compare.add_arguments(parser)
    # A plan is always one of adapters, beside full training; learning rates cost nothing.
    add_lora_arguments(parser, hide=("use_lora", "lora_plus_ratio", "lora_linears"))


def run(args: argparse.Namespace) -> int:
    from slime_plugins.lora.cost.memory import cost_of
    from slime_plugins.lora.cost.model import Model, Split

    check_flags(args)
    plan_compare.check_numbers(args)
    if args.compare:
        return plan_compare.run(args)
    plan_compare.refuse_without_compare(args)
    split = Split(tp=args.tp, pp=args.pp, dp=args.dp, ep=args.ep, etp=args.etp)
    model = Model.read(args.hf_checkpoint[0])
    model.check(split)
    cost = cost_of(
        model,
        LoRAConfig.from_args(args),
        split,
        dtype=args.dtype,
        freeze_base=args.lora_only_trainable,
        base_quant=BaseQuant.from_args(args),
    )
    beside = _beside(model, split, args) if args.tokens is not None else None
    if args.json:
        totals = {"lora": {"total": cost.lora.total}, "full": {"total": cost.full.total}}
        content = {k: v | totals[k] if k in totals else v for k, v in dataclasses.asdict(cost).items()}
        named = {} if beside is None else {"beside": dict(zip(("lora", "full"), map(dataclasses.asdict, beside)))}
        print(json.dumps(content | named))
    else:
        experts = f", ep {args.ep}, etp {split.experts_tp}" if model.num_experts else ""
        sizes = f"tp {args.tp}, pp {args.pp}, dp {args.dp}{experts}"
        print(f"{model.architecture}, {model.num_layers} layers, {args.dtype}; {sizes}")
        print(_render(cost, args, beside))
    return 0


def _beside(model, split, args: argparse.Namespace) -> tuple:
    """``StageActivations`` of the fullest stage with full recompute: with adapters, and in full training."""
    from slime_plugins.lora.cost.activations import Batch, stage_activations
    from slime_plugins.lora.cost.memory import Trained

    lora = Trained(base=not args.lora_only_trainable, lora=LoRAConfig.from_args(args), quant=BaseQuant.from_args(args))
    how = {"recompute": "full", "dtype": args.dtype}
    batch = Batch(tokens=args.tokens)
    stages = (stage_activations(model, one, split, batch, **how) for one in (lora, Trained(base=True)))
    return tuple(max(found, key=lambda stage: stage.total) for found in stages)


def _render(cost, args: argparse.Namespace, beside: tuple | None) -> str:
    lora, full = cost.lora, cost.full
    trained = cost.adapter_parameters + (0 if args.lora_only_trainable else cost.base_parameters)
    share = 100 * cost.adapter_parameters / (cost.base_parameters + cost.adapter_parameters)
    merged = f"{_size(cost.sync_merged)} merged, {_size(cost.sync_adapter)} adapter"
    rows = [
        ("", "LoRA", "full training"),
        ("parameters of the adapter", f"{cost.adapter_parameters:,} ({share:.4f} %)", ""),
        ("parameters that are trained", f"{trained:,}", f"{cost.base_parameters:,}"),
        ("GPU memory of the fullest rank", _size(lora.total), _size(full.total)),
        ("  base weights", _size(lora.base_weights), _size(full.base_weights)),
        ("  adapter weights", _size(lora.adapter_weights), "-"),
        ("  gradients, float32", _size(lora.gradients), _size(full.gradients)),
        ("  optimizer, float32", _size(lora.optimizer), _size(full.optimizer)),
        *(() if beside is None else _beside_rows(cost, args, *beside)),
        ("host memory for the reference policy", "0", _size(full.base_weights)),
        ("weight sync, to each engine", merged, _size(cost.sync_merged)),
        ("checkpoint with optimizer", _size(cost.checkpoint_lora), _size(cost.checkpoint_full)),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(f"{a.ljust(widths[0])}  {b.rjust(widths[1])}  {c.rjust(widths[2])}".rstrip() for a, b, c in rows)


def _beside_rows(cost, args: argparse.Namespace, lora, full) -> list[tuple[str, str, str]]:
    tokens = f"  activations of {args.tokens:,} tokens, full recompute"
    totals = (cost.lora.total + lora.total, cost.full.total + full.total)
    return [
        (tokens, _size(lora.kept * lora.in_flight), _size(full.kept * full.in_flight)),
        ("  logits and loss, or a layer in backward", _size(lora.work), _size(full.work)),
        ("  all of it, beside CUDA and NCCL", _size(totals[0]), _size(totals[1])),
    ]


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
