"""What bench/gpu.py measures, a section after the other, each within its seconds; runs in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _gpu_clock import Budget, Clock, Times
from _gpu_forms import FORMS, LINEARS, Kernels, set_recompute
from _harness import Shapes, Trainer, paired_ratio, qwen3_4b, saved_activation_bytes

LINEAR_FORMS = ("frozen", "lora", "lora taps", "peft", "te frozen", "te lora", "te lora taps")
MODEL_FORMS = ("frozen", "full", "lora", "lora taps", "lora split", "peft", "te frozen", "te lora", "te lora taps")
BEHIND_A_NORM = ("linear_qkv", "linear_fc1")
"""The linears in which TransformerEngine's layer differs."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured. The first of each are the ones that say most."""

    model: Shapes
    tokens: tuple[int, ...]
    tensor_parallel: tuple[int, ...]
    ranks: tuple[int, ...]
    experts: tuple[int, int, int]
    """How many, their input and their inner width."""
    rows: tuple[int, ...]
    """Of all experts."""
    rounds: int


QWEN3_4B = Sizes(
    model=qwen3_4b(num_layers=12, tokens=8192),
    tokens=(8192, 2048),
    tensor_parallel=(1, 2, 4),
    ranks=(16, 32, 64),
    experts=(16, 2048, 768),
    rows=(65536, 8192),
    rounds=16,
)
SMALL = Sizes(
    model=dataclasses.replace(
        QWEN3_4B.model,
        hidden=64,
        ffn=96,
        num_heads=4,
        num_query_groups=2,
        head_dim=16,
        vocab_size=128,
        num_layers=1,
        tokens=16,
    ),
    tokens=(16,),
    tensor_parallel=(1, 2),
    ranks=(8,),
    experts=(5, 32, 16),
    rows=(64,),
    rounds=2,
)


class Report:
    """The JSON of a run, written after every case: what has been measured stays, whatever comes after it.

    Args:
        path: of a file that holds at least ``{"sections": {}}``.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.content: dict[str, Any] = json.loads(path.read_text())

    def section(self, name: str) -> dict[str, Any]:
        return self.content["sections"].setdefault(name, {"status": "begun", "rows": [], "not_measured": []})

    def row(self, section: str, **values: Any) -> None:
        self.section(section)["rows"].append(values)
        self.save()

    def save(self) -> None:
        written = self._path.with_suffix(".part")
        written.write_text(json.dumps(self.content, indent=1) + "\n")
        written.replace(self._path)


@dataclasses.dataclass
class Run:
    """What a section is given."""

    clock: Clock
    kernels: Kernels
    sizes: Sizes
    report: Report


def run_section(name: str, seconds: float, run: Run) -> bool:
    """Measure, and write down how it ended. Returns whether all went well."""
    section, begun, budget = run.report.section(name), time.perf_counter(), Budget(seconds)
    run.report.save()
    with budget.attempt(name):
        SECTIONS[name](run, budget)
    section["status"] = f"failed: {budget.failed[0]}" if budget.failed else "done"
    section["not_measured"] += budget.not_measured
    section["seconds"] = round(time.perf_counter() - begun, 1)
    run.report.save()
    run.clock.clean_up()
    return not budget.failed


def over(times: dict[str, Times], name: str, floor: str) -> dict[str, float] | None:
    """Ratio within a round; None where one of them was not measured."""
    if name not in times or floor not in times:
        return None
    return paired_ratio(times[name].device, times[floor].device)


# Linears alone ------------------------------------------------------------------------------------------------------


def linears(run: Run, budget: Budget) -> None:
    """Forward and backward of one linear under Megatron's DDP, at the shapes that a rank has."""
    for rank in run.sizes.ranks:
        for tp in run.sizes.tensor_parallel:
            if not budget.allows(f"TP {tp}, rank {rank}"):
                continue
            shapes, trainers = shard_shapes(run.sizes.model, tp), dict[str, Trainer]()
            for name in LINEAR_FORMS:
                with budget.attempt(f"TP {tp}, rank {rank}, {name}"):
                    trainers[name] = run.kernels.build(name, shapes, rank=rank)
            for tokens in run.sizes.tokens:
                for leaf, (size_in, size_out) in shapes.linears.items():
                    case = {"tp": tp, "linear": leaf, "tokens": tokens, "rank": rank}
                    if budget.allows(str(case)):
                        _one_linear(run, budget, case, trainers, (size_in, size_out))
            del trainers
            run.clock.clean_up()


def shard_shapes(shapes: Shapes, tp: int) -> Shapes:
    """One layer of what a rank has at this tensor-parallel size, as a model of its own."""
    shares = {name: getattr(shapes, name) // tp for name in ("num_heads", "num_query_groups", "ffn")}
    return dataclasses.replace(shapes, **shares, num_layers=1, vocab_size=128, tokens=16)


def _one_linear(
    run: Run, budget: Budget, case: dict[str, Any], trainers: dict[str, Trainer], size: tuple[int, int]
) -> None:
    leaf, dtype = case["linear"], getattr(torch, run.sizes.model.dtype)
    x, dy = (torch.randn(case["tokens"], 1, n, device=torch.cuda.current_device(), dtype=dtype) for n in size)
    calls = {}
    for name, trainer in trainers.items():
        if leaf in BEHIND_A_NORM or not FORMS[name].te:
            linear = trainer.model.module.decoder.layers[0].get_submodule(LINEARS[leaf])
            call = there_and_back(lambda x, linear=linear: linear(x)[0], x, dy)
            with budget.attempt(f"{name}, {case}"):
                call()
                calls[name] = call
    times = run.clock.turns(calls, rounds=run.sizes.rounds, repeats=3, alone=True)
    wide = (x.numel() + dy.numel()) * x.element_size()
    least = 2 * wide + 2 * size[0] * size[1] * x.element_size()
    run.report.row("linears", **case, forms=rows_of(run, times, wide, least))


def there_and_back(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, dy: torch.Tensor):
    """A call that runs the function forward and backward, up to the gradient of x, which is let go."""
    anchor = torch.zeros((), device=x.device, requires_grad=True)

    def call() -> None:
        function(_Source.apply(anchor, x)).backward(dy)

    return call


class _Source(torch.autograd.Function):
    """x as something that other modules have computed: its gradient is wanted, and accumulated nowhere."""

    @staticmethod
    def forward(ctx, anchor, x):
        return x.detach()

    @staticmethod
    def backward(ctx, dx):
        return None, None


def rows_of(run: Run, times: dict[str, Times], wide: int, least: int) -> dict[str, dict[str, Any]]:
    """Form -> its numbers; those over the frozen base where that one was measured.

    Args:
        wide: bytes of one pass over input and output.
        least: bytes that the frozen base has to move.
    """
    rows, speed = {}, run.report.content["ceilings"]["copy_gb_s"]
    for name, one in times.items():
        floor = FORMS[name].floor
        rows[name] = {"us": 1e3 * one.ms, "host_us": 1e3 * one.host_ms, "gb_s": least / one.ms / 1e6}
        if floor in times:
            extra_ms = one.ms - times[floor].ms
            rows[name]["over_frozen"] = over(times, name, floor)
            rows[name] |= {"extra_us": 1e3 * extra_ms, "extra_passes": extra_ms * 1e6 * speed / wide}
    return rows


# A model ------------------------------------------------------------------------------------------------------------


def model(run: Run, budget: Budget) -> None:
    """Training steps of all forms taking turns: forward, backward, gradient reductions, clipping, Adam."""
    trainers, held = _build_all(run, budget, MODEL_FORMS)
    for recompute in ("none", "full"):
        for tokens in run.sizes.tokens:
            case = f"{tokens} tokens, recompute {recompute}"
            if not budget.allows(case):
                continue
            rows = {name: {"held_bytes": held[name]} for name in trainers}
            fitting = _measure_memory(run, budget, trainers, rows, tokens, recompute)
            times = run.clock.turns(
                {name: step_of(trainers[name]) for name in fitting}, rounds=run.sizes.rounds, warmup=1
            )
            for name in fitting:
                floor = FORMS[name].floor
                rows[name] |= {"ms": times[name].ms, "enqueue_ms": times[name].host_ms}
                rows[name]["over_frozen"] = over(times, name, floor)
                rows[name]["full_over"] = over(times, "full", name)
                if tokens == run.sizes.tokens[0] and budget.allows(f"kernels of {name}, {case}"):
                    with budget.attempt(f"kernels of {name}, {case}"):
                        rows[name]["kernels"] = sum(n for n, _ in run.clock.kernels(trainers[name].step).values())
            run.report.row("model", tokens=tokens, recompute=recompute, forms={name: rows[name] for name in fitting})


def _build_all(run: Run, budget: Budget, names: tuple[str, ...]) -> tuple[dict[str, Trainer], dict[str, int]]:
    """The forms that fit into memory, and the bytes that each holds between steps; the first one lends its weights."""
    trainers: dict[str, Trainer] = {}
    held = {}
    for name in names:
        with budget.attempt(name):
            before = run.clock.allocated()
            base = next(iter(trainers.values())).model.module if trainers else None
            trainer = run.kernels.build(name, run.sizes.model, rank=run.sizes.ranks[0], base=base)
            trainer.step()
            trainers[name], held[name] = trainer, run.clock.allocated() - before
    return trainers, held


def _measure_memory(
    run: Run, budget: Budget, trainers: dict[str, Trainer], rows: dict[str, Any], tokens: int, recompute: str
) -> list[str]:
    """Warms all up and fills in their bytes. Returns the forms whose step fits."""
    fitting = []
    for name, trainer in trainers.items():
        trainer.draw_batch(run.sizes.model.vocab_size, tokens)
        set_recompute(trainer, recompute)
        with budget.attempt(f"{name}, {tokens} tokens, recompute {recompute}"):
            trainer.step()
            rows[name]["step_bytes"] = run.clock.peak(trainer.step)
            rows[name]["saved_bytes"] = saved_activation_bytes(trainer)
            fitting.append(name)
        run.clock.clean_up()
    return fitting


def step_of(trainer: Trainer) -> Callable[[], float]:
    """A step that says how long the host was busy with forward and backward: the clipping waits for the device."""

    def step() -> float:
        begun = time.perf_counter()
        trainer.forward_backward()
        seconds = time.perf_counter() - begun
        trainer.update()
        return seconds

    return step


# Kernels ------------------------------------------------------------------------------------------------------------


def profile(run: Run, budget: Budget) -> None:
    """Where a LoRA step's time goes, kernel by kernel, beside the frozen base's."""
    names = ("frozen", "lora", "te lora")
    trainers, _ = _build_all(run, budget, names)
    seen: dict[str, dict[str, tuple[int, float]]] = {}
    for name, trainer in trainers.items():
        trainer.step()
        seen[name] = run.clock.kernels(trainer.step)
    kernels = sorted({kernel for one in seen.values() for kernel in one}, key=lambda k: -_ms(seen, "lora", k))
    for kernel in kernels:
        forms = {
            name: {"launches": one[kernel][0], "ms": one[kernel][1]} for name, one in seen.items() if kernel in one
        }
        run.report.section("profile")["rows"].append({"kernel": kernel, "forms": forms})
    run.report.section("profile")["tokens"] = run.sizes.model.tokens


def _ms(seen: dict[str, dict[str, tuple[int, float]]], form: str, kernel: str) -> float:
    return seen.get(form, {}).get(kernel, (0, 0.0))[1]


def experts(run: Run, budget: Budget) -> None:
    from _gpu_experts import measure

    measure(run, budget)


SECTIONS: dict[str, Callable[[Run, Budget], None]] = {
    "linears": linears,
    "model": model,
    "experts": experts,
    "profile": profile,
}
