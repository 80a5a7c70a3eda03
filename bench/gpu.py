"""What adapters cost on a GPU: one JSON and one table, in about ten minutes on an H100. Exit 1 if a section failed.

    python bench/gpu.py                          CUDA, Qwen3-4B's shapes, bf16
    python bench/gpu.py --sections linears       one of them alone
    python bench/gpu.py --device cpu --small     does the script run? Its numbers mean nothing

linears    90 s   each linear alone at a rank's shapes (TP 1, 2, 4), forward and backward, L2 cold
model     240 s   training steps of 12 layers with their head; recompute none and full; memory; kernels
experts    60 s   linears of 16 experts, evenly used and skewed; bf16 is first compared with float64
profile    30 s   a LoRA step kernel by kernel, beside the frozen base's

Forms take turns, and a ratio is the median over rounds of the ratio within a round:
    frozen         nothing trains but the final norm; gradients flow to the input of every layer
    full           everything trains
    lora           this project's adapters as --lora-linears auto runs them; "taps" and "split" as named
    peft           PEFT's layer around the same linears
    te ...         the same on the stand-in of TransformerEngine, where a linear has its norm in it

passes: what an adapter adds, in passes over the linear's input and output at the speed of a copy: +3 is 6NI+6NO bytes
in bf16. A section that has used up its seconds begins no new case, and says what it did not measure. Sections run in
one process until one fails; the rest then get another. Adam is torch's, not a fused one, to the cost of full training.
What must be installed: docs/development.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _table import table

HERE = Path(__file__).resolve().parent
SECTIONS = {"linears": 90.0, "model": 240.0, "experts": 60.0, "profile": 30.0}
"""And the seconds after which no new case is begun."""
OVERDRAWN = 180.0
"""Seconds more, for imports and the last cases of all, after which a process is ended: it hangs."""
FORMS_OF_LINEARS = ("lora", "lora taps", "peft", "te lora", "te lora taps")
GIB = 2**30


def main() -> int:
    args = parse_args()
    if args.measure:
        return measure(args)
    out = args.json or HERE / "out" / "gpu.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"command": " ".join(sys.argv), "sections": {}}))
    left = args.sections
    while left:
        code = run_process(args, left, out)
        if code == 2:
            return code  # nothing can be measured here, and it has said why
        left = note_what_ended(out, left, code)
    content = json.loads(out.read_text())
    text = render(content)
    print(text)
    out.with_suffix(".txt").write_text(text + "\n")
    print(out)
    return 1 if any(section["status"] != "done" for section in content["sections"].values()) else 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="default: all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes and two rounds: does it run?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: bench/out/gpu.json; the table beside it")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # what main() starts
    args = parser.parse_args()
    if args.device == "cpu" and not args.small:
        parser.error("--device cpu would take hours at these shapes and time nothing of interest; add --small")
    return args


def run_process(args: argparse.Namespace, sections: list[str], out: Path) -> int:
    """Measure in a process of its own, which may die of what it does. Returns its exit code."""
    command = [sys.executable, __file__, "--measure", "--json", str(out), "--device", args.device]
    command += ["--sections", *sections, *(["--small"] if args.small else [])]
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if args.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    try:
        return subprocess.run(
            command, env=environment, timeout=OVERDRAWN + sum(SECTIONS[s] for s in sections)
        ).returncode
    except subprocess.TimeoutExpired:
        return 124


def note_what_ended(out: Path, sections: list[str], code: int) -> list[str]:
    """The sections that are still to be measured, in another process. One that was begun and not ended has failed."""
    content = json.loads(out.read_text())
    found = content["sections"]
    if sections[0] not in found:
        found[sections[0]] = {"rows": [], "not_measured": [], "status": "begun"}
    for section in found.values():
        if section["status"] == "begun":
            section["status"] = f"failed: its process ended with code {code}; the output says why"
    out.write_text(json.dumps(content, indent=1) + "\n")
    return [name for name in sections if name not in found]


def measure(args: argparse.Namespace) -> int:
    """In the process that ``run_process`` starts: the sections up to the first that fails."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            "error: torch finds no CUDA device; to see whether the script runs: --device cpu --small", file=sys.stderr
        )
        return 2
    from _gpu_forms import Kernels, one_rank
    from _gpu_sections import QWEN3_4B, SMALL, Clock, Report, Run, run_section
    from _harness import commit, machine

    on_cpu, report = args.device == "cpu", Report(args.json)
    with tempfile.TemporaryDirectory() as folder, one_rank(f"{folder}/store", on_cpu=on_cpu):
        run = Run(Clock(on_cpu=on_cpu), Kernels(on_cpu=on_cpu), SMALL if args.small else QWEN3_4B, report)
        report.content |= {"commit": commit(), "machine": machine(), "base": run.kernels.said}
        if "ceilings" not in report.content:
            report.content["ceilings"] = run.clock.ceilings(small=args.small)
        for name in args.sections:
            print(f"{name} ...", file=sys.stderr, flush=True)
            if not run_section(name, SECTIONS[name], run):
                return 1
    return 0


# The table ----------------------------------------------------------------------------------------------------------


def render(content: dict[str, Any]) -> str:
    if "machine" not in content:
        return "nothing was measured"
    machine, ceilings = content["machine"], content["ceilings"]
    lines = [
        f"{machine['device']}, torch {machine['torch']}, commit {content['commit']}",
        f"copies {ceilings['copy_gb_s']:.0f} GB/s, bf16 products {ceilings['bf16_tflop_s']:.0f} TFLOP/s",
        "base: " + ", ".join(f"{what} {how}" for what, how in content["base"].items()),
    ]
    for name, section in content["sections"].items():
        lines += ["", f"{name}: {section['status']}" + (f", {section['seconds']} s" if "seconds" in section else "")]
        if section["rows"]:
            lines.append(TABLES[name](section["rows"]))
        lines += [f"not measured: {what}" for what in section["not_measured"]]
    return "\n".join(lines)


def _over(form: dict[str, Any] | None) -> str:
    """Times the frozen base, and passes more."""
    if not form or not form.get("over_frozen"):
        return "-"
    return f"{form['over_frozen']['median']:.3f} {form['extra_passes']:+.1f}"


def _us(form: dict[str, Any] | None) -> tuple[str, str]:
    return (f"{form['us']:.0f}", f"{form['gb_s']:.0f}") if form else ("-", "-")


def render_linears(rows: list[dict[str, Any]]) -> str:
    header = ("TP, linear, tokens, rank", "frozen us", "GB/s", "te frozen us", "GB/s")
    header += tuple(f"{form}, passes" for form in FORMS_OF_LINEARS)
    cells = []
    for row in rows:
        name, forms = f"{row['tp']} {row['linear']} {row['tokens']} {row['rank']}", row["forms"]
        floors = (*_us(forms.get("frozen")), *_us(forms.get("te frozen")))
        cells.append((name, *floors, *(_over(forms.get(form)) for form in FORMS_OF_LINEARS)))
    return table(header, cells)


def render_model(rows: list[dict[str, Any]]) -> str:
    header = ("tokens, recompute, form", "ms", "/ frozen", "(quartiles)", "full /", "enqueue ms", "kernels")
    header += ("held GiB", "step GiB", "saved GiB")
    cells = []
    for row in rows:
        for name, form in row["forms"].items():
            over, full = form["over_frozen"], form["full_over"]
            cells.append(
                (
                    f"{row['tokens']} {row['recompute']} {name}",
                    f"{form['ms']:.1f}",
                    f"{over['median']:.3f}" if over else "-",
                    f"{over['quartile_1']:.3f}-{over['quartile_3']:.3f}" if over else "-",
                    f"{full['median']:.2f}" if full else "-",
                    f"{form['enqueue_ms']:.1f}",
                    str(form.get("kernels", "-")),
                    *(
                        "-" if form[k] is None else f"{form[k] / GIB:.2f}"
                        for k in ("held_bytes", "step_bytes", "saved_bytes")
                    ),
                )
            )
    return table(header, cells)


def render_experts(rows: list[dict[str, Any]]) -> str:
    header = ("linear, rows, spread", "frozen us", "GB/s", "lora, passes")
    return table(
        header,
        [
            (
                f"{row['linear']} {row['rows']} {row['spread']}",
                *_us(row["forms"].get("frozen")),
                _over(row["forms"].get("lora")),
            )
            for row in rows
        ],
    )


def render_profile(rows: list[dict[str, Any]]) -> str:
    names = ("frozen", "lora", "te lora")

    def cells(label: str, some: list[dict[str, Any]]) -> tuple[str, ...]:
        found = [[row["forms"][name] for row in some if name in row["forms"]] for name in names]
        return (label[:70], *(f"{sum(f['launches'] for f in one)} {sum(f['ms'] for f in one):.2f}" for one in found))

    shown = [cells(row["kernel"], [row]) for row in rows[:20]]
    rest = [cells("the other kernels", rows[20:])] if rows[20:] else []
    return table(("kernel", *(f"{name}: launches, ms" for name in names)), [*shown, *rest, cells("all", rows)])


TABLES = {"linears": render_linears, "model": render_model, "experts": render_experts, "profile": render_profile}


if __name__ == "__main__":
    sys.exit(main())
