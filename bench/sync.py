"""What it costs to gather, name and write an adapter of as many tensors as Qwen3-30B-A3B has. Exit 1 if too much.

    python bench/sync.py                               48 layers, 128 experts, EP 2 x TP 2: 37,248 tensors
    python bench/sync.py --layers 2 --experts 8        a few seconds

The widths are toys, the counts are real: what is measured is the work per tensor and per collective, which a GPU does
not make faster. Four processes hold the model; rank 0 does what an export and a weight sync do with the adapter:

    gather     ``gather_projections``: every adapted projection whole on rank 0 (both ends start with it)
    name       ``to_peft``: names and config
    check      ``validate_adapter``: ranks, targets, finite values
    sglang     ``for_sglang``: what differs in SGLang's names (the weight sync alone)
    write      ``write_adapter``: the files that an export leaves, and colocated engines read out of memory

Seconds are rank 0's processor time, the least of the repeats: other work on the machine does not count. Collectives
are seen where torch dispatches them (``c10d``). In flight is the largest buffer that one of them fills on rank 0, as a
share of the adapter: 1 is a second copy of all of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from _harness import Setting, Shapes, add_lora, build_model, run_ranks, table, write_json
from torch.utils._python_dispatch import TorchDispatchMode

PER_LAYER = 8
"""Collectives per layer that are allowed, whatever the number of experts."""
SECONDS = 2.0
"""Of rank 0, from the live adapter to the files, that this project aims at."""
IN_FLIGHT = 1.0
"""Largest buffer of one collective, in adapters: less than a copy of the whole."""
STAGES = ("gather", "name", "check", "sglang", "write")
SIZES = {"hidden": 32, "ffn": 64, "expert_ffn": 16, "heads": 4, "groups": 2, "head_dim": 8, "vocab": 64}


class CountCollectives(TorchDispatchMode):
    """The collectives entered inside: ``calls``, operator name -> number, and ``largest``, bytes of one's tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, operator = func.name().split(".")[0].partition("::")
        if namespace in ("c10d", "_c10d_functional"):
            self.calls[operator] += 1
            self.largest = max(self.largest, _bytes(args))
        return func(*args, **(kwargs or {}))


def _bytes(value) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0


def main() -> int:
    args = parse_args()
    setting = Setting(args.tp, args.tp > 1, ep=args.ep)
    with tempfile.TemporaryDirectory() as folder:
        base = write_base(Path(folder), args)
        found = run_ranks(measure, setting, args, str(base))[0]
    total = sum(found["seconds"].values())
    per_layer = found["collectives"] / args.layers
    print(
        f"{args.layers} layers, {args.experts} experts, {setting}, rank {args.rank}, {args.layout}: "
        f"{found['tensors']:,} tensors, {found['bytes'] / 2**20:.1f} MiB; processor time of rank 0"
    )
    rows = [(stage, f"{found['seconds'][stage]:.2f}", "") for stage in STAGES]
    rows.append(("all, s", f"{total:.2f}", f"{args.seconds:g}"))
    rows.append(("collectives per layer", f"{per_layer:.1f}", f"{PER_LAYER}"))
    rows.append(("in flight", f"{found['in_flight']:.3f}", f"{IN_FLIGHT}"))
    print(table(("", "", "allowed"), rows))
    content = {k: v for k, v in vars(args).items() if k != "json"}
    print(write_json("sync.json", {**content, **found, "per_layer": per_layer, "total": total}, args.json))
    return 1 if per_layer > PER_LAYER or total > args.seconds or found["in_flight"] > IN_FLIGHT else 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 48), ("experts", 128), ("tp", 2), ("ep", 2), ("rank", 8), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"allowed (default: {SECONDS:g})")
    parser.add_argument("--layout", choices=("fused", "split"), default="split", help="default: split")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: bench/out/sync.json")
    return parser.parse_args()


def write_base(folder: Path, args: argparse.Namespace) -> Path:
    """A Qwen3-MoE checkpoint of these counts, its weights zero: names and shapes are what is read of it."""
    from safetensors.torch import save_file

    hidden, heads, head_dim = SIZES["hidden"], SIZES["heads"], SIZES["head_dim"]
    shapes = {"q_proj": (heads * head_dim, hidden), "o_proj": (hidden, heads * head_dim)}
    shapes |= dict.fromkeys(("k_proj", "v_proj"), (SIZES["groups"] * head_dim, hidden))
    expert = dict.fromkeys(("gate_proj", "up_proj"), (SIZES["expert_ffn"], hidden))
    expert["down_proj"] = (hidden, SIZES["expert_ffn"])
    weights = {"model.embed_tokens": (SIZES["vocab"], hidden), "lm_head": (SIZES["vocab"], hidden)}
    for layer in range(args.layers):
        path = f"model.layers.{layer}"
        weights |= {f"{path}.self_attn.{leaf}": shape for leaf, shape in shapes.items()}
        weights[f"{path}.mlp.gate"] = (args.experts, hidden)
        for number in range(args.experts):
            weights |= {f"{path}.mlp.experts.{number}.{leaf}": shape for leaf, shape in expert.items()}
    tensors = {f"{name}.weight": torch.zeros(shape, dtype=torch.bfloat16) for name, shape in weights.items()}
    save_file(tensors, folder / "model.safetensors")
    config = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": args.layers}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def measure(setting: Setting, args: argparse.Namespace, base_dir: str) -> dict:
    """One rank: what ``main`` reports. The ranks without the whole adapter only gather."""
    from slime_plugins.lora.base.checkpoint import BaseCheckpoint
    from slime_plugins.lora.ends.export import gather_projections
    from slime_plugins.lora.peft.dialect import for_sglang
    from slime_plugins.lora.peft.directory import validate_adapter, write_adapter
    from slime_plugins.lora.peft.form import to_peft

    model, base = model_of(setting, args), BaseCheckpoint(base_dir)
    base.names("module")  # read once in a run
    with CountCollectives() as counter:
        gather_projections(model)
    first = torch.distributed.get_rank() == 0
    best: dict[str, float] = {}
    for _ in range(args.repeats):
        clock = Clock(best)
        torch.distributed.barrier()
        with clock("gather"):
            projections = gather_projections(model)
        if not first:
            continue
        with clock("name"):
            config, tensors = to_peft(projections, base)
        with clock("check"):
            validate_adapter(config, tensors)
        with clock("sglang"):
            config, tensors = for_sglang(config, tensors, base)
        with clock("write"):
            write_adapter(Path(base_dir) / "adapter", config, tensors, validated=True)
    if not first:
        return {}
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    return {
        "seconds": best,
        "collectives": sum(counter.calls.values()),
        "calls": dict(counter.calls),
        "tensors": len(tensors),
        "bytes": size,
        "in_flight": counter.largest / size,
        "sha256": content_digest(config, tensors),
    }


class Clock:
    """``with clock(stage):`` keeps the least processor time of every stage, in ``best``."""

    def __init__(self, best: dict[str, float]) -> None:
        self.best = best

    def __call__(self, stage: str) -> Clock:
        self.stage = stage
        return self

    def __enter__(self) -> None:
        self.start = time.process_time()

    def __exit__(self, *error) -> None:
        spent = time.process_time() - self.start
        self.best[self.stage] = min(spent, self.best.get(self.stage, spent))


def content_digest(config: dict, tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes and bytes, by name, and the config without where the base was."""
    sha = hashlib.sha256(json.dumps({**config, "base_model_name_or_path": ""}, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sha.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def model_of(setting: Setting, args: argparse.Namespace) -> torch.nn.Module:
    """Attention and routed experts, adapters on all of their linears, the same values at every split."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.moe import moe_utils

    from slime_plugins.lora.adapters import iter_adapters
    from slime_plugins.lora.rehearsal.model import RMSNorm

    moe_utils.__dict__.setdefault("te_general_gemm", None)  # which 0.16.1 reads without TE, and has not set
    layer = get_gpt_layer_local_spec(num_experts=args.experts, moe_grouped_gemm=False, normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    shapes = Shapes(
        hidden=SIZES["hidden"],
        ffn=SIZES["ffn"],
        num_heads=SIZES["heads"],
        num_query_groups=SIZES["groups"],
        head_dim=SIZES["head_dim"],
        vocab_size=SIZES["vocab"],
        num_layers=args.layers,
        tokens=8,
        dtype="bfloat16",
    )
    model = build_model(
        shapes,
        setting,
        lambda base, config: layer,
        num_moe_experts=args.experts,
        moe_router_topk=2,
        moe_ffn_hidden_size=SIZES["expert_ffn"],
        expert_model_parallel_size=args.ep,
        expert_tensor_parallel_size=args.tp,
        moe_token_dispatcher_type="alltoall",
    )
    add_lora(model, rank=args.rank, layout=args.layout)
    for linear in iter_adapters(model):
        for name, parameter in linear.lora_parameters().items():
            generator = torch.Generator().manual_seed(
                int(hashlib.sha256(f"{linear.lora.name}{name}".encode()).hexdigest()[:8], 16)
            )
            with torch.no_grad():
                parameter.normal_(0.0, 0.02, generator=generator)
    return model


if __name__ == "__main__":
    sys.exit(main())
