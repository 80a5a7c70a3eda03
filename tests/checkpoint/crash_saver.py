"""Saves checkpoints on two ranks over and over and kills them with SIGKILL at random moments. Run by test_crash.py.

    python crash_saver.py HF_DIR RUN_DIR SEED TRIALS

One process imports Megatron and forks the ranks of every trial. Prints one JSON line per trial.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

torch.set_num_threads(1)
warnings.simplefilter("ignore")

from slime_plugins.lora.rehearsal import cpu  # noqa: E402

cpu.enable()

from megatron.core import parallel_state as mpu  # noqa: E402
from megatron.core import tensor_parallel  # noqa: E402

from slime_plugins.lora import LoRAConfig, apply_lora  # noqa: E402
from slime_plugins.lora.adapters import iter_adapters  # noqa: E402
from slime_plugins.lora.checkpoint.directory import list_published  # noqa: E402
from slime_plugins.lora.checkpoint.reader import AdapterCheckpoint  # noqa: E402
from slime_plugins.lora.checkpoint.save import save_adapter  # noqa: E402
from slime_plugins.lora.rehearsal.model import build_chunks  # noqa: E402

WORLD = 2
CONFIG = LoRAConfig(rank=4, alpha=8)


def value(step: int) -> float:
    """What every adapter entry of a step's checkpoint is."""
    return step / 1024


def rank_main(rank: int, store: str, hf_dir: str, root: str, first_step: int, async_save: bool, done: int) -> None:
    """Save step after step until killed; writes a line to ``done`` after every save that has returned."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    mpu.initialize_model_parallel(tensor_model_parallel_size=WORLD)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    chunks = build_chunks(hf_dir, apply=lambda chunks: apply_lora(chunks, CONFIG))
    for step in range(first_step, first_step + 1000):
        with torch.no_grad():
            for linear in iter_adapters(chunks):
                linear.lora_A.fill_(value(step))
                linear.lora_B.fill_(value(step))
        save_adapter(chunks, root, step=step, async_save=async_save)
        if rank == 0:
            os.write(done, f"{step - 1 if async_save else step}\n".encode())


def trial(hf_dir: str, root: str, first_step: int, async_save: bool, rng: random.Random) -> int:
    """Start the ranks, let one or two saves return, kill them at a random moment. Returns the last step returned."""
    store = tempfile.mktemp(prefix="slime-lora-crash-")
    read, write = os.pipe()
    children = []
    for rank in range(WORLD):
        child = os.fork()
        if child == 0:
            try:
                rank_main(rank, store, hf_dir, root, first_step, async_save, write)
            finally:
                os._exit(1)
        children.append(child)
    os.close(write)
    finished = b""
    started = time.monotonic()
    while finished.count(b"\n") < 2:  # the second gives the duration of one save
        if not select.select([read], [], [], 60)[0]:
            raise RuntimeError("no save returned within a minute")
        before, started = started, time.monotonic()
        data = os.read(read, 4096)
        if not data:
            raise RuntimeError("a rank ended before it was killed")
        finished += data
    time.sleep(rng.uniform(0, 2 * (started - before)))
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)
    while data := os.read(read, 4096):
        finished += data
    os.close(read)
    Path(store).unlink(missing_ok=True)  # the killed ranks' meeting place
    return int(finished.split()[-1])


def examine(root: str) -> dict:
    """What a reader finds afterwards."""
    found = AdapterCheckpoint(root)
    published = [AdapterCheckpoint(path) for path in list_published(Path(root))]
    whole = all(
        bool((tensor == value(checkpoint.manifest.step)).all())
        for checkpoint in published
        for p in checkpoint.projections()
        for tensor in (p.A, p.B)
    )
    return {
        "latest": found.manifest.step,
        "published": [checkpoint.manifest.step for checkpoint in published],
        "whole": whole,
        "leftovers": sorted(entry for entry in os.listdir(root) if entry.startswith(".")),
    }


def main() -> None:
    hf_dir, root, seed, trials = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    rng = random.Random(seed)
    for number in range(trials):
        first_step = 1 + 100 * number
        returned = trial(hf_dir, root, first_step, number % 2 == 1, rng)
        print(json.dumps({"returned": returned, **examine(root)}), flush=True)
        for old in list_published(Path(root))[:-2]:
            for file in old.iterdir():
                file.unlink()
            old.rmdir()


if __name__ == "__main__":
    main()
