"""Seconds and bytes of an adapter checkpoint, against a checkpoint of the full model by Megatron itself.

    python bench/checkpoint.py                       hidden 1024, 4 layers, r=16, bf16; TP=1 and TP=2; a minute
    python bench/checkpoint.py --hidden 512 --rounds 5

Both hold weights, float32 masters and Adam's moments, after one step. ``blocked`` is what an asynchronous save takes
from training. Loads come from the page cache. Megatron's writer runs in processes of its own, as in training.
The last table is arithmetic checked by writing: one layer of Qwen3-4B at larger tensor-parallel sizes, where a
checkpoint has more and smaller records, each with a header.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _harness import Setting, cpu_shapes, qwen3_4b, run_ranks, table, trainer_of, write_json

SETTINGS = (Setting(1, False), Setting(2, False))
COLUMN = ("linear_qkv", "linear_fc1")
MIB = 2**20


def main() -> int:
    args = parse_args()
    shapes = dataclasses.replace(
        cpu_shapes(args.hidden, num_layers=args.layers, tokens=32), dtype="bfloat16", vocab_size=32768
    )
    results = []
    for setting in SETTINGS:
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            result = run_ranks(measure, setting, shapes, args.rank, args.rounds, folder)[0]
        results.append({"setting": str(setting), **result})
        print(f"{setting}: done", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        layers = [one_layer(tp, args.rank, Path(folder, str(tp))) for tp in (1, 2, 4, 8)]
    print(render(results, layers, args))
    content = {"rank": args.rank, "hidden": args.hidden, "layers": args.layers, "results": results, "qwen3_4b": layers}
    print(write_json("checkpoint.json", content, args.json))
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024, help="default: 1024")
    parser.add_argument("--layers", type=int, default=4, help="default: 4")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default: 16)")
    parser.add_argument("--rounds", type=int, default=3, help="the median is reported (default: 3)")
    parser.add_argument("--dir", help="where to write (default: the system's temporary directory)")
    parser.add_argument("--json", type=Path, help="default: bench/out/checkpoint.json")
    return parser.parse_args()


def measure(setting: Setting, shapes, rank: int, rounds: int, folder: str) -> dict:
    """Medians over the rounds, and the sizes; what rank 0 saw."""
    logging.disable(logging.WARNING)
    found = {"adapter": _adapter(setting, shapes, rank, rounds, folder)}
    found["full"] = _full(setting, shapes, rank, rounds, folder)
    return found


def _adapter(setting, shapes, rank, rounds, folder) -> dict:
    from slime_plugins.lora import load_adapter, save_adapter
    from slime_plugins.lora.adapters import iter_adapters

    trainer = trainer_of("lora", shapes, setting, rank=rank)
    trainer.step()
    model, optimizer, step = trainer.model, trainer.optimizer, iter(range(1000))
    times = {
        "save": _median(rounds, lambda: save_adapter(model, folder, optimizer=optimizer, step=next(step))),
        "load": _median(rounds, lambda: load_adapter(model, folder, optimizer=optimizer)),
    }
    blocked, written = [], []
    for _ in range(rounds):
        begun = _now()
        save = save_adapter(model, folder, optimizer=optimizer, step=next(step), async_save=True)
        blocked.append(_now() - begun)
        time.sleep(times["save"])  # the training that goes on meanwhile
        begun = _now()
        save.finish()
        blocked[-1] += _now() - begun
        written.append(save.path)
    parameters = sum(linear.lora_full_numel() for linear in iter_adapters(model))
    return {**times, "blocked": statistics.median(blocked), "bytes": _size(written[-1]), "parameters": parameters}


def _full(setting, shapes, rank, rounds, folder) -> dict:
    from megatron.core import dist_checkpointing
    from megatron.core import parallel_state as mpu

    trainer = trainer_of("full", shapes, setting, rank=rank)
    trainer.step()
    model, optimizer = trainer.model.module, trainer.optimizer
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True),
    }
    path = Path(folder, "full")

    def state(is_loading: bool) -> dict:
        of_model = model.sharded_state_dict(metadata=metadata)
        of_optimizer = optimizer.sharded_state_dict(of_model, is_loading=is_loading, metadata=metadata)
        return {"model": of_model, "optimizer": of_optimizer}

    def save() -> None:
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        torch.distributed.barrier()
        dist_checkpointing.save(state(False), str(path))

    def load() -> None:
        loaded = dist_checkpointing.load(state(True), str(path))
        model.load_state_dict(loaded["model"])  # and not the optimizer: with torch's Adam, 0.16.1 stops at "step"

    save()  # the first one starts Megatron's writer processes
    times = {"save": _median(rounds, save), "load": _median(rounds, load)}
    return {**times, "bytes": _size(path), "parameters": trainer.trainable * setting.tp}


def one_layer(tp: int, rank: int, path: Path) -> dict:
    """Bytes of a checkpoint of one adapted layer of Qwen3-4B, written as ``tp`` ranks would."""
    from slime_plugins.lora.checkpoint import storage

    rows = {
        "linear_qkv": (4096, 1024, 1024),
        "linear_proj": (2560,),
        "linear_fc1": (9728, 9728),
        "linear_fc2": (2560,),
    }
    path.mkdir()
    parameters, written = 0, []
    shards: list[list] = [[] for _ in range(tp)]
    for leaf, (fan_in, _) in qwen3_4b(num_layers=1, tokens=1).linears.items():
        column = leaf in COLUMN
        pieces = [((rank, fan_in), None if column else 1)]
        pieces += [((out, rank), 0 if column else None) for out in rows[leaf]]
        for number, (shape, dim) in enumerate(pieces):
            parameters += shape[0] * shape[1]
            for i in range(tp if dim is not None else 1):
                local = [n // tp if d == dim else n for d, n in enumerate(shape)]
                offset = tuple(i * local[d] if d == dim else 0 for d in range(2))
                weight = torch.zeros(local, dtype=torch.bfloat16)
                states = torch.zeros(3, *local)
                shards[i].append(storage.Shard(f"decoder.layers.0.{leaf}.{number}", weight, shape, offset))
                key = f"optimizer.state.decoder.layers.0.{leaf}.{number}"
                shards[i].append(storage.Shard(key, states, (3, *shape), (0, *offset)))
    written = [storage.write_shards(path, i, mine) for i, mine in enumerate(shards)]
    storage.finish(path, written)
    return {"tp": tp, "parameters": parameters, "bytes": _size(path)}


def _median(rounds: int, fn: Callable) -> float:
    seconds = []
    for _ in range(rounds):
        begun = _now()
        fn()
        seconds.append(_now() - begun)
    return statistics.median(seconds)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    torch.distributed.barrier()
    return time.perf_counter()


def _size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def render(results: list[dict], layers: list[dict], args: argparse.Namespace) -> str:
    rows = []
    for result in results:
        adapter, full = result["adapter"], result["full"]
        for name, found in (("adapter", adapter), ("full model", full)):
            rows.append(
                (
                    f"{result['setting']} {name}",
                    f"{found['parameters']:,}",
                    f"{found['bytes'] / MIB:.2f}",
                    f"{found['bytes'] / found['parameters']:.2f}",
                    f"{found['save']:.3f}",
                    f"{found['blocked']:.3f}" if "blocked" in found else "",
                    f"{found['load']:.3f}",
                )
            )
        ratios = [f"{full[key] / adapter[key]:.0f}x" for key in ("parameters", "bytes", "save", "load")]
        rows.append((f"{result['setting']} full / adapter", *ratios[:2], "", ratios[2], "", ratios[3]))
    header = ("", "parameters", "MiB", "bytes/param", "save s", "blocked s", "load s")
    text = f"hidden {args.hidden}, {args.layers} layers, r={args.rank}, bf16 weights, Adam\n{table(header, rows)}\n\n"
    text += f"one layer of Qwen3-4B, r={args.rank}\n"
    rows = [(f"TP={r['tp']}", f"{r['bytes']:,}", f"{r['bytes'] / r['parameters']:.3f}") for r in layers]
    return text + table(("", "bytes", "bytes/param"), rows)


if __name__ == "__main__":
    sys.exit(main())
