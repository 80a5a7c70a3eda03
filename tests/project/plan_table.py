"""Make the tables of docs/memory.md anew, by ``slime-lora plan --compare``: python tests/project/plan_table.py"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]

from published_configs import QWEN25, write_config  # noqa: E402

from slime_plugins.lora.cli import main  # noqa: E402

PAGE = ROOT / "docs/memory.md"
START, END = "<!-- made by tests/project/plan_table.py -->\n", "<!-- end -->\n"
FLAGS = ("--tp", "2", "--dp", "4", "--tokens", "8192")
_GIB = 2**30


def compared() -> list[dict]:
    """The JSON of the command, a model each."""
    with tempfile.TemporaryDirectory() as directory:
        paths = [str(write_config(directory, name)) for name in QWEN25]
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            assert main(["plan", "--compare", "--json", "--hf-checkpoint", *paths, *FLAGS]) == 0
    return json.loads(said.getvalue())["models"]


def tables() -> str:
    """Weights, gradients and optimizer; then all of it, with full recompute and without."""
    models = compared()
    return "\n".join(
        [
            "GiB of weights, gradients and optimizer on the fullest of 8 GPUs:\n",
            _table(models, _static),
            "\nThe same with activations of 8,192 tokens, logits and loss: with full recompute / without any:\n",
            _table(models, _both),
        ]
    )


def _table(models: list[dict], cell) -> str:
    names = [method["name"] for method in models[0]["methods"]]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {m['model']} | " + " | ".join(cell(method) for method in m["methods"]) + " |" for m in models]
    return "\n".join(lines)


def _static(method: dict) -> str:
    peak = method["peaks"].get("full")
    return "-" if peak is None else f"{(peak['total'] - peak['activations'] - peak['work']) / _GIB:.2f}"


def _both(method: dict) -> str:
    if not method["peaks"]:
        return "-"
    return " / ".join(f"{method['peaks'][kind]['total'] / _GIB:.1f}" for kind in ("full", "none"))


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text(before + START + tables() + "\n" + END + rest.partition(END)[2])
