"""What a run leaves in its directory: metrics as they come, then curve, summary and the directory to serve."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from slime_plugins.lora.base.quantization import BaseQuant
from slime_plugins.lora.control.history import BEST, FILE, FINAL
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.rehearsal import wandb_run
from slime_plugins.lora.rehearsal.rewards import RewardSample
from slime_plugins.lora.rehearsal.settings import Settings

ADAPTER, SERVE, EVENTS, TEACHER = "adapter", "serve", "tensorboard", "teacher"
SETTINGS, METRICS, SAMPLES, SUMMARY = "settings.json", "metrics.jsonl", "samples.jsonl", "summary.json"
CURVES = ("reward.png", "loss.png")
_REPLACED = (ADAPTER, SERVE, EVENTS, TEACHER, METRICS, SAMPLES, SUMMARY, *CURVES, BEST, FINAL, FILE)
WINDOW = 10
"""Steps over which rewards are averaged beside the last one: a single step's is noisy."""


def check_replaceable(out: Path) -> None:
    """Raise UsageError unless ``out`` is new, empty or an earlier rehearsal's."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file, expected a directory")
    if out.is_dir() and any(out.iterdir()) and not (out / SETTINGS).is_file():
        raise UsageError(f"--out {out}: holds other files than a rehearsal's; name an empty or new directory")


def would_remove(out: Path, path: Path) -> bool:
    """Would ``claim`` remove what ``path`` names, all of it or part?"""
    path, claimed = path.resolve(), [(out / name).resolve() for name in _REPLACED]
    return any(path.is_relative_to(name) or name.is_relative_to(path) for name in claimed)


def claim(out: Path) -> bool:
    """Make ``out`` ready for a new run; True if it held an earlier one, whose files (no others) are removed."""
    check_replaceable(out)
    out.mkdir(parents=True, exist_ok=True)
    replaced = any(out.iterdir())
    for name in _REPLACED:
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return replaced


class Recorder:
    """Writes every step to ``metrics.jsonl``, ``samples.jsonl``, TensorBoard and, if asked, Weights & Biases.

    At once, so that a running or broken run can be read. Steps count from 1; 0 is before the first.
    """

    def __init__(self, out: Path, settings: Settings):
        from torch.utils.tensorboard import SummaryWriter

        (out / SETTINGS).write_text(json.dumps(settings.to_dict(), indent=2) + "\n")
        self.steps: list[dict] = []
        self._lines = open(out / METRICS, "w", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
        self._samples = open(out / SAMPLES, "w", encoding="utf-8")  # noqa: SIM115
        self._events = SummaryWriter(out / EVENTS)
        self._wandb = wandb_run.start(settings) if settings.use_wandb else None

    def step(self, metrics: dict) -> None:
        """``metrics`` holds ``step`` and numbers."""
        self.steps.append(metrics)
        self._lines.write(json.dumps(metrics) + "\n")
        self._lines.flush()
        self.scalars(metrics["step"], {name: value for name, value in metrics.items() if name != "step"})

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """For the curves alone."""
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def samples(self, step: int, samples: Sequence[RewardSample], *, held_out: bool = False) -> None:
        """What was sampled and what it earned."""
        for sample in samples:
            line: dict = {"step": step, "prompt": sample.prompt, "response": sample.response, "reward": sample.reward}
            line |= {"label": sample.label, "held_out": held_out}
            self._samples.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._samples.flush()

    def mean(self, name: str) -> float:
        """Of the last ``WINDOW`` steps that have it."""
        values = [step[name] for step in self.steps if name in step][-WINDOW:]
        return sum(values) / len(values)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind, *exc) -> None:
        self._lines.close()
        self._samples.close()
        self._events.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)


def write_summary(out: Path, summary: dict) -> None:
    """``summary.json``."""
    (out / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")


_AXES = {
    "reward": ("mean reward", "mean reward of the rollout"),
    "loss": ("loss", "loss"),
    "kl": ("KL to the base", "KL(policy || base) in nats per token"),
    "eval_reward": ("held-out reward", "mean reward on held-out prompts"),
}
"""Metric -> its name in the legend, and beside its axis."""


def draw_curve(out: Path, steps: list[dict], title: str, names: tuple[str, str]) -> Path:
    """Two metrics over the steps, the second where there is any; ``reward.png`` or ``loss.png``, after the first."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = ([(step["step"], step[name]) for step in steps if name in step] for name in names)
    axis = figure.add_subplot()
    axis.plot(*zip(*left), color="tab:blue", marker=".", label=_AXES[names[0]][0])
    axis.set(xlabel="step", ylabel=_AXES[names[0]][1], title=title)
    values = [value for _, value in left]
    if names[0] == "reward" and min(values) >= 0 and max(values) <= 1:
        axis.set_ylim(-0.02, 1.02)
    axis.grid(alpha=0.3)
    if right:
        other = axis.twinx()
        other.plot(*zip(*right), color="tab:orange", linestyle="--", label=_AXES[names[1]][0])
        other.set_ylabel(_AXES[names[1]][1])
        other.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    path = out / f"{names[0]}.png"
    figure.savefig(path, dpi=120)
    return path


def serve_command(out: Path, dtype: str, device: str, quant: BaseQuant | None = None) -> str:
    """Make ``serve/`` (links to base and adapter) and return the shell command that serves it.

    ``quant``: of the base; ``transformers serve`` has nested NF4 of all linears, and no other.
    """
    from slime_plugins.lora.peft.directory import read_config
    from slime_plugins.lora.peft.serve_dir import make_serve_dir

    base = read_config(out / ADAPTER)["base_model_name_or_path"]
    directory = make_serve_dir(base, out / ADAPTER, out / SERVE)
    command = [_transformers(), "serve", str(directory), "--device", device, "--dtype", dtype]
    if quant is not None:
        command += ["--quantization", "bnb-4bit"]
    command += ["--host", "127.0.0.1", "--port", str(_free_port())]
    return "HF_HUB_OFFLINE=1 " + shlex.join(command)


def _transformers() -> str:
    """The console script of the environment that runs this, as a name where the shell would find the same one."""
    beside = Path(sys.executable).with_name("transformers")
    found = shutil.which("transformers")
    if found and (not beside.exists() or Path(found).samefile(beside)):
        return "transformers"
    with contextlib.suppress(ValueError):
        return str(beside.relative_to(Path.cwd()))
    return str(beside)


def _free_port(wanted: int = 8000) -> int:
    """The wanted port if nobody listens there, else one that is free now."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            # As servers do: a port whose last connections are still timing out is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return probe.getsockname()[1]
    raise OSError("no free port on 127.0.0.1")


def relative(path: Path) -> str:
    """A path as the user would type it here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
