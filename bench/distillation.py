"""Memory and time of distillation's loss beside cross-entropy and TRL's, and of a training step beside SFT's.

    python bench/distillation.py                       # some minutes; TRL's own code where `make contracts` has put it
    python bench/distillation.py --tokens 2048 --vocab 65536 --settings TP=1

Peak: what the process held at most above what it held with logits and hidden states, in buffers of tokens x
vocabulary / TP x 4 bytes. Each measurement is a process of its own. Cross-entropy is Megatron's, which overwrites the
logits and holds nothing else. Seconds are processor time, on a GPU wall time. Exit code 1 if the package's loss takes
more than one buffer beyond cross-entropy.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _harness import Setting, paired_ratio, run_ranks, settings_here, table, take_turns, write_json

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this tree's package, whichever is installed
CROSS_ENTROPY, ALONE, BESIDE, TRL = "cross-entropy", "distillation", "distillation beside another loss", "TRL"
MOST = 1.0
"""Buffers beyond cross-entropy's."""
HIDDEN = 256


@dataclass(frozen=True)
class Sizes:
    tokens: int
    vocab: int
    chunk_size: int


def main() -> int:
    args = parse_args()
    sizes = Sizes(args.tokens, args.vocab, args.chunk_size)
    results = [losses_of(setting, sizes) for setting in settings_here() if str(setting) in args.settings]
    step = run_ranks(steps, Setting(1, False), args.hidden, args.rounds)[0]
    print(render(sizes, results))
    print(
        f"\na step: sft {step['sft']:.2f} s, distillation {step['gkd']:.2f} s: x {step['ratio']['median']:.2f} "
        f"({step['ratio']['quartile_1']:.2f}-{step['ratio']['quartile_3']:.2f}); a frozen forward alone "
        f"{step['teacher']:.2f} s: x {(step['sft'] + step['teacher']) / step['sft']:.2f}"
    )
    print(f"the teacher's cache: {step['cache']:.0f} bytes a token in float32, its logits {step['logits']:.0f}")
    print(write_json("distillation.json", {"sizes": vars(sizes), "losses": results, "step": step}, args.json))
    too_much = [result for result in results if result["extra"] > MOST]
    for result in too_much:
        print(f"TOO MUCH at {result['setting']}: {result['extra']:.2f} buffers beyond cross-entropy, at most {MOST:g}")
    return int(bool(too_much))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="default: 1024")
    parser.add_argument("--vocab", type=int, default=32768, help="default: 32768")
    parser.add_argument("--chunk-size", type=int, default=64, help="default: 64, a sixteenth of the tokens")
    parser.add_argument("--hidden", type=int, default=512, help="of the model whose step is timed (default: 512)")
    parser.add_argument("--rounds", type=int, default=6, help="steps that are timed (default: 6)")
    parser.add_argument("--settings", nargs="+", default=["TP=1", "TP=2"], metavar="SETTING", help="TP=1 TP=2")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: bench/out/distillation.json")
    return parser.parse_args()


def losses_of(setting: Setting, sizes: Sizes) -> dict[str, Any]:
    """Peak in buffers and seconds of every loss, the fullest and slowest rank's."""
    # Freed memory goes back at once, so that what is held is what is used; other benchmarks want the contrary.
    os.environ.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="0")
    names = [CROSS_ENTROPY, ALONE, BESIDE, *([TRL] if setting.tp == 1 and trl_loss() is not None else [])]
    found = {}
    for name in names:
        ranks = run_ranks(measure, setting, name, sizes)
        found[name] = {key: max(rank[key] for rank in ranks) for key in ("peak", "seconds")}
    del os.environ["MALLOC_MMAP_THRESHOLD_"], os.environ["MALLOC_TRIM_THRESHOLD_"]
    extra = found[ALONE]["peak"] - found[CROSS_ENTROPY]["peak"]
    return {"setting": str(setting), "losses": found, "extra": extra}


def render(sizes: Sizes, results: list[dict]) -> str:
    rows = []
    for result in results:
        for name, loss in result["losses"].items():
            extra = loss["peak"] - result["losses"][CROSS_ENTROPY]["peak"]
            target = f"{MOST:.2f}" if name == ALONE else "-"
            numbers = (f"{loss['peak']:.2f}", f"{extra:+.2f}", target, f"{loss['seconds']:.2f}")
            rows.append((f"{result['setting']} {name}", *numbers))
    if not any(TRL in result["losses"] for result in results):
        rows.append((f"{TRL}: `make contracts` fetches it", "", "", "", ""))
    buffer = sizes.tokens * sizes.vocab * 4 / 2**20
    head = f"{sizes.tokens} tokens x {sizes.vocab} columns, float32: a buffer is {buffer:.0f} MiB / TP; "
    head += f"chunks of {sizes.chunk_size}"
    return head + "\n" + table(("", "peak, buffers", "beyond", "at most", "seconds"), rows)


def trl_loss() -> Callable | None:
    """TRL's own function; None where its wheel has not been fetched."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from wheels import TRL as VERSIONS
    from wheels import Wheel, cache

    root = cache() / f"trl-{VERSIONS[-1]}"
    if not root.is_dir():
        return None
    given = {"F": torch.nn.functional, "torch": torch}
    module = "trl.experimental.gkd.gkd_trainer"
    return Wheel(root, "trl").take(module, "GKDTrainer.generalized_jsd_loss", **given).generalized_jsd_loss


def loss_of(name: str, setting: Setting, sizes: Sizes) -> Callable[..., torch.Tensor]:
    """(logits [M, V/T] that a model has made, teacher's hidden states [M, H], head [V/T, H]) -> scalar."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from slime_plugins.lora.objectives.divergence import Divergence, Vocabulary, of_hidden, reduce_over

    group = parallel_state.get_tensor_model_parallel_group()
    vocabulary = Vocabulary(group.rank() * sizes.vocab // setting.tp, sizes.vocab, reduce_over(group))
    divergence = Divergence(0.5, chunk_size=sizes.chunk_size)

    def cross_entropy(logits, hidden, head):
        return vocab_parallel_cross_entropy(logits[:, None], torch.zeros(len(logits), 1, dtype=torch.int64)).mean()

    def alone(logits, hidden, head):
        weights = torch.full((len(logits),), 1 / len(logits))
        return divergence(logits, of_hidden(hidden, head), weights, vocabulary, overwrite=True)[0]

    def beside(logits, hidden, head):
        # A loss first that keeps what it needs, as the policy loss does; it may overwrite a copy of its own.
        weights = torch.full((len(logits),), 1 / len(logits))
        return (
            cross_entropy(logits * 1.0, hidden, head)
            + divergence(logits, of_hidden(hidden, head), weights, vocabulary)[0]
        )

    def trl(logits, hidden, head):
        return trl_loss()(logits[None], (hidden @ head.t())[None], None, 0.5, 1.0)

    return {CROSS_ENTROPY: cross_entropy, ALONE: alone, BESIDE: beside, TRL: trl}[name]


def measure(setting: Setting, name: str, sizes: Sizes) -> dict[str, float]:
    """One loss on this rank, forward and backward: peak in buffers, seconds."""
    compute, columns = loss_of(name, setting, sizes), sizes.vocab // setting.tp
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    draw = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
    hidden, head, own = draw(sizes.tokens, HIDDEN), draw(columns, HIDDEN), draw(sizes.tokens, HIDDEN).requires_grad_()
    small = draw(8, columns).requires_grad_()
    compute(small * 1.0, hidden[:8], head).backward()  # what is made once
    logits = own @ head.t()
    torch.distributed.barrier()
    before = _start_of_peak()
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    (gradient,) = torch.autograd.grad(compute(logits, hidden, head), logits)
    _synchronize()
    seconds = clock() - start
    del gradient
    return {"peak": (_peak() - before) / (4 * sizes.tokens * columns), "seconds": seconds}


def _start_of_peak() -> int:
    """Bytes held now; the peak counts from here."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Step:
    """A step of a trainer on one batch, or the teacher's pass alone."""

    def __init__(self, trainer: Any, batch: Any, *, teacher_alone: bool = False) -> None:
        self.trainer, self.batch, self.teacher_alone = trainer, batch, teacher_alone

    def step(self) -> None:
        if self.teacher_alone:
            self.trainer._computed(self.trainer.objective.prepare(self.batch))
        else:
            self.trainer.train(self.batch)


def steps(setting: Setting, hidden: int, rounds: int) -> dict[str, Any]:
    """Median seconds of an optimizer step of the rehearsal's trainer, and bytes a token of what the teacher leaves."""
    from slime_plugins.lora.config import LoRAConfig
    from slime_plugins.lora.objectives.batch import make_batch
    from slime_plugins.lora.rehearsal.settings import Settings
    from slime_plugins.lora.rehearsal.tiny import make_tiny
    from slime_plugins.lora.rehearsal.trainer import RankTrainer

    rows = [[3 + i for i in range(128)]] * 8
    batch = make_batch(rows, rows, multiple=1, is_given=torch.ones(8))
    trainers = {}
    with tempfile.TemporaryDirectory() as folder:
        sizes = dict(num_layers=4, hidden=hidden, ffn=3 * hidden, vocab_size=4096, tokenizer=False)
        base = make_tiny(Path(folder) / "base", "qwen3", **sizes)
        for objective in ("sft", "gkd"):
            settings = Settings(
                objective=objective, hf_checkpoint=str(base), tp=1, n_samples_per_prompt=1, num_steps_per_rollout=1,
                lora=LoRAConfig(rank=8),
            )  # fmt: skip
            trainers[objective] = RankTrainer()
            trainers[objective].build(settings)
        trainers["gkd"].take_teacher("base", None)
    forms = {name: Step(trainer, batch) for name, trainer in trainers.items()}
    forms["teacher"] = Step(trainers["gkd"], batch, teacher_alone=True)
    seconds = take_turns(forms, rounds, warmup=1)["wall" if torch.cuda.is_available() else "cpu"]
    kept = trainers["gkd"]._computed(trainers["gkd"].objective.prepare(batch)).fields["teacher_hidden"]
    return {
        **{name: statistics.median(values) for name, values in seconds.items()},
        "ratio": paired_ratio(seconds["gkd"], seconds["sft"]),
        "cache": kept.nbytes / batch.tokens.numel(),
        "logits": 4.0 * 4096,
    }


if __name__ == "__main__":
    raise SystemExit(main())
