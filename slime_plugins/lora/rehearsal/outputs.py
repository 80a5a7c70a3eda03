"""What a run leaves in its directory: metrics as they come, then curve, summary and the directory to serve."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import socket
import sys
from pathlib import Path

from slime_plugins.lora.base.quantization import BaseQuant
from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.rehearsal.settings import Settings

ADAPTER, SERVE, SETTINGS, METRICS, SUMMARY, CURVE, EVENTS = (
    "adapter",
    "serve",
    "settings.json",
    "metrics.jsonl",
    "summary.json",
    "reward.png",
    "tensorboard",
)


def check_replaceable(out: Path) -> None:
    """Raise UsageError unless ``out`` is new, empty or an earlier rehearsal's."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file, expected a directory")
    if out.is_dir() and any(out.iterdir()) and not (out / SETTINGS).is_file():
        raise UsageError(f"--out {out}: holds other files than a rehearsal's; name an empty or new directory")


def claim(out: Path) -> bool:
    """Make ``out`` ready for a new run; True if it held an earlier one, whose files (no others) are removed."""
    check_replaceable(out)
    out.mkdir(parents=True, exist_ok=True)
    replaced = any(out.iterdir())
    for name in (ADAPTER, SERVE, METRICS, SUMMARY, CURVE, EVENTS):
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return replaced


class Recorder:
    """Writes every step to ``metrics.jsonl`` and TensorBoard at once, so that a running or broken run can be read."""

    def __init__(self, out: Path, settings: Settings):
        from torch.utils.tensorboard import SummaryWriter

        (out / SETTINGS).write_text(json.dumps(settings.to_dict(), indent=2) + "\n")
        self.steps: list[dict] = []
        self._lines = open(out / METRICS, "w", encoding="utf-8")  # noqa: SIM115 - closed in close()
        self._events = SummaryWriter(out / EVENTS)

    def step(self, metrics: dict) -> None:
        """``metrics`` holds ``step`` and numbers."""
        self.steps.append(metrics)
        self._lines.write(json.dumps(metrics) + "\n")
        self._lines.flush()
        for name, value in metrics.items():
            if name != "step":
                self._events.add_scalar(name, value, metrics["step"])
        self._events.flush()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exc) -> None:
        self._lines.close()
        self._events.close()


def write_summary(out: Path, summary: dict) -> None:
    """``summary.json``."""
    (out / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")


def draw_curve(out: Path, steps: list[dict], title: str) -> None:
    """``reward.png``: mean reward and KL to the base over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    numbers = [step["step"] for step in steps]
    reward = figure.add_subplot()
    reward.plot(numbers, [step["reward"] for step in steps], color="tab:blue", marker=".", label="mean reward")
    reward.set(xlabel="step (one rollout each)", ylabel="mean reward of the rollout", ylim=(-0.02, 1.02), title=title)
    reward.grid(alpha=0.3)
    kl = reward.twinx()
    kl.plot(numbers, [step["kl"] for step in steps], color="tab:orange", linestyle="--", label="KL to the base")
    kl.set_ylabel("KL(policy || base) in nats per token")
    kl.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(out / CURVE, dpi=120)


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
