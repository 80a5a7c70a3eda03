"""``slime-lora plan``: argument text and printing; the arithmetic is in ``cost``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from slime_plugins.lora.arguments import add_lora_arguments
from slime_plugins.lora.base.decoder import HFBase
from slime_plugins.lora.base.experts import ExpertsBase
from slime_plugins.lora.base.quantization import BaseQuant, check_flags
from slime_plugins.lora.config import LoRAConfig
from slime_plugins.lora.errors import UsageError

NAME = "plan"
HELP = "What a LoRA run will cost: parameters, GPU memory by part, bytes per weight sync. From config.json alone."
EPILOG = """\
Dense decoders, and Qwen3-MoE. Activations are not counted unless --tokens says how many a GPU has at a time; then they
are estimated, with full recompute, and are about those of full training.

examples:
  slime-lora plan --hf-checkpoint Qwen3-4B --tp 2 --dp 4 --lora-r 32 --lora-alpha 32
  slime-lora plan --hf-checkpoint Qwen3-4B --lora-target-modules q_proj v_proj --lora-layout split
  slime-lora plan --hf-checkpoint Qwen3-32B --dp 8 --lora-r 8 --lora-base-quant nf4 --tokens 2048 \\
      --lora-target-modules q_proj k_proj v_proj o_proj
  slime-lora plan --hf-checkpoint Qwen3-30B-A3B --tp 4 --ep 4 --etp 1 --lora-base-quant nf4
  slime-lora plan --hf-checkpoint Qwen3-4B --tp 2 --json | jq .lora.total
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hf-checkpoint", required=True, metavar="DIR", help="its config.json is all that is read")
    for flag, what in (("tp", "tensor-parallel ranks"), ("pp", "pipeline stages"), ("dp", "data-parallel ranks")):
        parser.add_argument(f"--{flag}", type=int, default=1, metavar="N", help=f"{what} (default: 1)")
    parser.add_argument("--ep", type=int, default=1, metavar="N", help="expert-parallel ranks (default: 1)")
    parser.add_argument("--etp", type=int, metavar="N", help="expert-tensor-parallel ranks (default: --tp)")
    parser.add_argument("--tokens", type=int, metavar="N", help="on a GPU at a time: estimate activations of these")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the base (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="bytes and counts as one JSON object")
    # A plan is always one of adapters, beside full training; learning rates cost nothing.
    add_lora_arguments(parser, hide=("use_lora", "lora_plus_ratio"))


def run(args: argparse.Namespace) -> int:
    from slime_plugins.lora.cost import cost_of

    for flag in ("tp", "pp", "dp", "ep", "etp", "tokens"):
        given = getattr(args, flag)
        if given is not None and given < 1:
            raise UsageError(f"--{flag} is {given}; expected at least 1")
    check_flags(args)
    base = _read_base(Path(args.hf_checkpoint))
    base.check_parallel(tp=args.tp, pp=args.pp)
    split, quant = _split(base, args), BaseQuant.from_args(args)
    cost = cost_of(
        base.shapes(),
        LoRAConfig.from_args(args),
        num_layers=base.num_layers,
        tied=base.tied,
        split=split,
        dtype=args.dtype,
        freeze_base=args.lora_only_trainable,
        base_quant=quant,
    )
    beside = {} if args.tokens is None else _beside(base, split, args, packed=quant is not None)
    if args.json:
        totals = {"lora": {"total": cost.lora.total}, "full": {"total": cost.full.total}}
        content = {k: v | totals[k] if k in totals else v for k, v in dataclasses.asdict(cost).items()}
        print(json.dumps(content | ({"beside": beside} if beside else {})))
    else:
        experts = f", ep {split.ep}, etp {split.tensor(expert=True)}" if isinstance(base, ExpertsBase) else ""
        print(
            f"{base.architecture}, {base.num_layers} layers, {args.dtype}; tp {args.tp}, pp {args.pp}, dp {args.dp}"
            f"{experts}"
        )
        print(_render(cost, args, beside))
    return 0


def _split(base, args: argparse.Namespace):
    from slime_plugins.lora.cost import Split

    split = Split(tp=args.tp, pp=args.pp, dp=args.dp, ep=args.ep, etp=args.etp)
    if not isinstance(base, ExpertsBase):
        given = next((flag for flag in ("ep", "etp") if getattr(args, flag) not in (None, 1)), None)
        if given:
            raise UsageError(f"--{given} {getattr(args, given)}: {base.architecture} has no experts; leave it out")
        return Split(tp=args.tp, pp=args.pp, dp=args.dp)
    etp = split.tensor(expert=True)
    if args.tp * args.dp % (etp * args.ep):
        raise UsageError(
            f"--ep {args.ep} times --etp {etp} does not divide the {args.tp * args.dp} ranks of a stage (--tp times "
            "--dp); choose --dp or --etp so that it does"
        )
    base.check_experts(ep=args.ep, etp=etp)
    return split


def _beside(base, split, args: argparse.Namespace, *, packed: bool) -> dict[str, int]:
    """What a step takes beside the parts of ``Cost``, by name."""
    from slime_plugins.lora.cost import activations_of, largest_dense

    shapes = base.shapes()
    found = {
        "activations": activations_of(
            shapes,
            tokens=args.tokens,
            num_layers=base.num_layers,
            split=split,
            per_token=base.experts_per_token if isinstance(base, ExpertsBase) else 1,
            dtype=args.dtype,
        )
    }
    return found | ({"one_dense_linear": largest_dense(shapes, split, args.dtype)} if packed else {})


def _read_base(path: Path):
    config_file = path / "config.json"
    if not config_file.is_file():
        raise UsageError(f"{path}: no config.json, expected a Hugging Face checkpoint directory")
    try:
        config = json.loads(config_file.read_text())
    except ValueError as error:
        raise ValueError(f"{config_file}: not JSON: {error}") from None
    named = config.get("architectures") if isinstance(config, dict) else None
    experts = isinstance(named, list) and named and named[0] in ExpertsBase.architectures
    return (ExpertsBase if experts else HFBase)._from_config(config, path)


def _render(cost, args: argparse.Namespace, beside: dict[str, int]) -> str:
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
        *_beside_rows(cost, args, beside),
        ("host memory for the reference policy", "0", _size(full.base_weights)),
        ("weight sync, to each engine", merged, _size(cost.sync_merged)),
        ("checkpoint with optimizer", _size(cost.checkpoint_lora), _size(cost.checkpoint_full)),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(f"{a.ljust(widths[0])}  {b.rjust(widths[1])}  {c.rjust(widths[2])}".rstrip() for a, b, c in rows)


def _beside_rows(cost, args: argparse.Namespace, beside: dict[str, int]) -> list[tuple[str, str, str]]:
    if not beside:
        return []
    activations, dense = beside["activations"], beside.get("one_dense_linear", 0)
    both, total = _size(activations), (cost.lora.total + activations + dense, cost.full.total + activations)
    rows = [(f"  activations of {args.tokens:,} tokens (estimate)", both, both)]
    if dense:
        rows.append(("  one linear, dense while it multiplies", _size(dense), "-"))
    return [*rows, ("  with these, beside CUDA and NCCL", _size(total[0]), _size(total[1]))]


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
