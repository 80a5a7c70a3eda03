"""Run the launch scripts of ``examples/lora`` against stand-ins for ray, slime and Megatron; nothing real is called.

The stand-ins record their calls: an argument per line, a blank line after each call.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples" / "lora"
SCRIPTS = sorted(EXAMPLES.glob("run-*.sh"))
_RECORD = 'printf "%s\\n" "$(basename "$0")" "$@" "" >>"$CALLS"'
STAND_INS = {
    "ray": _RECORD,
    # What ends processes by name or all at once, and what no script needs.
    **dict.fromkeys(("pkill", "killall", "fuser", "python", "python3"), _RECORD + "; exit 9"),
    "nvidia-smi": "for i in 0 1 2 3 4 5 6 7; do echo GPU $i: NV18; done",
}
HARMFUL = ("pkill", "killall", "fuser", "python", "python3")


def free_ports() -> tuple[int, int]:
    """Two ports of this machine that nobody listens on."""
    with socket.socket() as one, socket.socket() as two:
        for each in (one, two):
            each.bind(("127.0.0.1", 0))
        return one.getsockname()[1], two.getsockname()[1]


@dataclass
class Machine:
    """A directory that looks to the scripts like a machine with slime, Megatron, models and data."""

    root: Path
    ports: tuple[int, int]
    slime: Path | None = None
    base: Path | None = None

    def __post_init__(self):
        """Write what is not given."""
        (self.root / "bin").mkdir(parents=True)
        for name, body in STAND_INS.items():
            file = self.root / "bin" / name
            file.write_text(f"#!/bin/bash\n{body}\n")
            file.chmod(0o755)
        (self.root / "Megatron-LM/megatron/core").mkdir(parents=True)
        if self.slime is None:
            self.slime = self.root / "slime"
            _stand_in_for_slime(self.slime)
        self.base = self.base or self.root / "base"
        for script in SCRIPTS:
            _provide_what_is_named(script, self.base)

    @property
    def calls(self) -> list[list[str]]:
        """Every call of a stand-in: its name and its arguments."""
        file = self.root / "calls"
        text = file.read_text() if file.exists() else ""
        return [call.split("\n") for call in text.split("\n\n") if call.strip()]

    @property
    def jobs(self) -> list[list[str]]:
        """What was handed to ``ray job submit``."""
        return [call[call.index("--") + 1 :] for call in self.calls if call[:3] == ["ray", "job", "submit"]]

    def run(self, script: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a script; its calls are in ``calls``."""
        (self.root / "calls").unlink(missing_ok=True)
        env = {"PATH": f"{self.root / 'bin'}:{os.environ['PATH']}", "CALLS": str(self.root / "calls")}
        env |= {"SLIME_DIR": str(self.slime), "BASE_DIR": str(self.base), "HOME": str(self.root)}
        env |= {"MEGATRON_DIR": str(self.root / "Megatron-LM")}
        env |= {"RAY_PORT": str(self.ports[0]), "DASHBOARD_PORT": str(self.ports[1])} | environment
        return subprocess.run(
            ["bash", script, *words], env=env, cwd=self.root, capture_output=True, text=True, timeout=60, check=False
        )


def _provide_what_is_named(script: Path, base: Path) -> None:
    for name in re.findall(r'"\$\{BASE_DIR\}/([^"]+)"', script.read_text()):
        path = base / name
        if path.suffix in (".jsonl", ".parquet"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        elif "lora" not in name:  # what a run writes
            path.mkdir(parents=True, exist_ok=True)
            if not path.name.endswith("_torch_dist") and not (path / "config.json").exists():
                (path / "config.json").write_text("{}")


def _stand_in_for_slime(slime: Path) -> None:
    (slime / "scripts/models").mkdir(parents=True)
    for script in SCRIPTS:
        for name in re.findall(r"scripts/models/([\w.-]+\.sh)", script.read_text()):
            (slime / "scripts/models" / name).write_text("MODEL_ARGS=(\n   --num-layers 36\n)\n")
    (slime / "slime/utils").mkdir(parents=True)
    (slime / "slime/utils/arguments.py").write_text("@slime_lora.flags  # [slime-lora]\n")
    (slime / "slime_plugins/lora/slime").mkdir(parents=True)
    (slime / "slime_plugins/lora/slime/__init__.py").touch()
    (slime / "train.py").touch()
