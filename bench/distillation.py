"""Memory and time of distillation's loss, beside cross-entropy and TRL's, and of a whole training step beside SFT's.

    python bench/distillation.py                       # a minute; TRL's own code where `make contracts` has fetched it
    python bench/distillation.py --tokens 2048 --vocab 65536

Memory is what the process held at its peak (VmHWM, reset before) above what it held with logits and hidden states, in
buffers of tokens x vocabulary x 4 bytes. Each measurement is a process of its own. Exit 1 if the package's loss needs
more than one such buffer beyond what cross-entropy does.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from _harness import table, write_json

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this tree's package, whichever is installed
LOSSES = ("cross-entropy", "in place", "beside another loss", "TRL")
HIDDEN = 256


def status(name: str) -> int:
    """Bytes of VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def loss_of(name: str, chunk_size: int):
    """(logits [M, V] that a model has made, teacher's hidden states [M, H], head [V, H]) -> scalar."""
    if name == "cross-entropy":
        return lambda logits, hidden, head: torch.nn.functional.cross_entropy(
            logits, torch.zeros(len(logits), dtype=torch.int64)
        )
    if name == "TRL":
        jsd = trl_loss()
        return lambda logits, hidden, head: jsd(logits[None], (hidden @ head.t())[None], None, 0.5, 1.0)
    from slime_plugins.lora.objectives.divergence import Divergence, Vocabulary, of_hidden

    def ours(logits, hidden, head):
        weights = torch.full((len(logits),), 1 / len(logits))
        vocabulary = Vocabulary(0, logits.shape[1])
        measure = Divergence(0.5, chunk_size=chunk_size)
        return measure(logits, of_hidden(hidden, head), weights, vocabulary, overwrite=name == "in place")[0]

    return ours


def trl_loss():
    """TRL's own function; None where its wheel has not been fetched."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from wheels import TRL, Wheel, cache

    root = cache() / f"trl-{TRL[-1]}"
    if not root.is_dir():
        return None
    given = {"F": torch.nn.functional, "torch": torch}
    trainer = Wheel(root, "trl").take("trl.experimental.gkd.gkd_trainer", "GKDTrainer.generalized_jsd_loss", **given)
    return trainer.generalized_jsd_loss


def measure(name: str, tokens: int, vocab: int, chunk_size: int) -> tuple[float, float]:
    """One loss, forward and backward: peak in buffers, seconds."""
    torch.set_num_threads(1)
    compute = loss_of(name, chunk_size)
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, HIDDEN, generator=generator) for n in (tokens, vocab))
    small = torch.randn(8, vocab).requires_grad_()
    compute(small * 1.0, hidden[:8], head).backward()  # what is made once
    own = torch.randn(tokens, HIDDEN, generator=generator).requires_grad_()
    logits = own @ head.t()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    loss = compute(logits, hidden, head)
    (gradient,) = torch.autograd.grad(loss, logits)
    seconds = time.perf_counter() - start
    del gradient
    return (status("VmHWM") - before) / (4 * tokens * vocab), seconds


def step_seconds(objective: str, hidden: int) -> float:
    """Median seconds of an optimizer step of the rehearsal's trainer at TP 1."""
    from slime_plugins.lora.config import LoRAConfig
    from slime_plugins.lora.objectives.batch import make_batch
    from slime_plugins.lora.rehearsal.settings import Settings
    from slime_plugins.lora.rehearsal.tiny import make_tiny
    from slime_plugins.lora.rehearsal.trainer import RankTrainer

    with tempfile.TemporaryDirectory() as folder:
        base = make_tiny(
            Path(folder) / "base",
            "qwen3",
            num_layers=4,
            hidden=hidden,
            ffn=3 * hidden,
            vocab_size=4096,
            tokenizer=False,
        )
        settings = Settings(
            objective=objective, hf_checkpoint=str(base), tp=1, n_samples_per_prompt=1, num_steps_per_rollout=1,
            lora=LoRAConfig(rank=8),
        )  # fmt: skip
        trainer = RankTrainer()
        trainer.setup(settings, 0, f"{folder}/store", 1)
        if objective == "gkd":
            trainer.take_teacher("base", None)
        rows = [[3 + i for i in range(128)]] * 8
        batch = make_batch(rows, rows, multiple=1, is_given=torch.ones(8))
        seconds = []
        for _ in range(6):
            start = time.perf_counter()
            trainer.train(batch)
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[1:])


def apart(function, *args):
    """The result of a function in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *args).result()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--chunk-size", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=512, help="of the model whose training step is timed")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = [name for name in LOSSES if name != "TRL" or trl_loss() is not None]
    sizes = (options.tokens, options.vocab, options.chunk_size)
    losses = {name: apart(measure, name, *sizes) for name in names}
    print(f"{options.tokens} tokens x {options.vocab} columns, chunks of {options.chunk_size}, fp32, one CPU core")
    print(table(("loss", "peak, buffers", "seconds"), [(n, f"{p:.2f}", f"{s:.2f}") for n, (p, s) in losses.items()]))
    steps = {objective: apart(step_seconds, objective, options.hidden) for objective in ("sft", "gkd")}
    ratio = steps["gkd"] / steps["sft"]
    print(f"a training step: sft {steps['sft']:.2f} s, gkd {steps['gkd']:.2f} s, ratio {ratio:.2f}")
    print("the teacher's cache: 2 x hidden bytes a token in bf16 (Qwen3-30B-A3B, hidden 2048: 4,096), against")
    print("4 x vocabulary of its logits in fp32 (151,936 columns: 607,744)")
    extra = losses["in place"][0] - losses["cross-entropy"][0]
    report = {
        "losses": {name: {"peak_buffers": peak, "seconds": seconds} for name, (peak, seconds) in losses.items()},
        "steps": {**steps, "ratio": ratio},
        "extra_buffers": extra,
    }
    write_json("distillation.json", report, options.json)
    if extra > 1:
        print(f"TOO MUCH: {extra:.2f} buffers beyond cross-entropy, expected at most 1")
    return int(extra > 1)


if __name__ == "__main__":
    sys.exit(main())
