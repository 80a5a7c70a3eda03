"""``slime-lora verify``: argument text and printing; the checks are in ``peft.verify``."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import TYPE_CHECKING

from slime_plugins.lora.base.quantization import BaseQuant
from slime_plugins.lora.cli.arguments import add_names, place

if TYPE_CHECKING:
    from slime_plugins.lora.peft.checks import Problem
    from slime_plugins.lora.peft.verify import Report

NAME = "verify"
HELP = "Check that a PEFT adapter is whole, non-empty, trained, and fits its config and its base."
EPILOG = """\
Reads every tensor of the adapter once; of the base config.json, the safetensors headers and the first 4 KiB of each
tensor, or all of it with --full (which is remembered). Exit code 0: good, 1: not.

examples:
  slime-lora verify runs/rehearsal/adapter
  slime-lora verify runs/rehearsal/adapter --hf-checkpoint Qwen3-4B
  slime-lora verify adapter --hf-checkpoint Qwen3-4B --full
  slime-lora verify adapter --json | jq -r '.problems[].message'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument(
        "adapter", type=place, metavar="ADAPTER_DIR", help="directory with adapter_config.json and the weights"
    )
    parser.add_argument(
        "--hf-checkpoint", type=place, metavar="DIR", help="base model: check modules, shapes and weights against it"
    )
    parser.add_argument(
        "--full", action="store_true", help="compare every byte of the base, where the adapter notes what they were"
    )
    add_names(parser, reads=True)
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 if the adapter is good, else 1."""
    from slime_plugins.lora.errors import UsageError
    from slime_plugins.lora.peft.verify import verify_adapter

    if args.names and args.hf_checkpoint is None:
        raise UsageError("--names is a spelling of the base's: give it with --hf-checkpoint")
    if args.full and args.hf_checkpoint is None:
        raise UsageError("--full compares the base: give it with --hf-checkpoint")
    report = verify_adapter(args.adapter, args.hf_checkpoint, full=args.full, names=args.names)
    print(json.dumps(report.to_dict(), indent=2) if args.json else table(report))
    return 0 if report.ok else 1


def table(report: Report) -> str:
    """The report for people: what is there, then one line per warning and problem, then the verdict."""
    rows = [("adapter", report.adapter)]
    if report.base:
        rows.append(("base", report.base))
    if report.base_quant is not None:
        rows.append(("base in", how_to_load(BaseQuant(**report.base_quant))))
    if report.rank is not None and report.scalings:
        scalings = ", ".join(f"{scaling:g}" for scaling in report.scalings)
        rows.append(("rank, alpha", f"{report.rank}, {report.alpha:g} (scaling {scalings})"))
    if report.lora_A or report.lora_B:
        other = f", {report.other} other" if report.other else ""
        counts = f"{report.lora_A} lora_A, {report.lora_B} lora_B{other}, {', '.join(report.dtypes)}"
        rows.append(("tensors", counts))
        if report.extra:
            rows.append(("also trained", f"{', '.join(report.extra)} (beside the adapter: no server applies them)"))
        rows.append(("parameters", f"{report.parameters:,} ({report.bytes / 1e6:,.2f} MB)"))
        rows.append(("largest |B|", f"{report.largest_B:.3g}"))
        agreed = "none in the file" if report.checksums is None else f"{report.checksums} tensors agree"
        rows.append(("checksums", agreed))
    if report.checked_against:
        selected = (
            "" if report.expected_modules is None else f": target_modules selects {report.expected_modules} modules"
        )
        rows.append(("checked with", f"{report.checked_against}{selected}"))
        if report.base_compared:
            rows.append(("base compared", report.base_compared))
        rows += [("loads in", f"{loader}: {what}") for loader, what in report.loaders.items()]
    lines = [f"{name:<13} {value}" for name, value in rows]
    lines += [f"{'warning':<13} {message}" for message in _shortened(report.warnings)]
    lines += [f"{'PROBLEM':<13} {message}" for message in _shortened(report.problems)]
    return "\n".join([*lines, verdict(report)])


def verdict(report: Report) -> str:
    """The last line: a good adapter that some loader would take half of is not simply ok."""
    if report.not_whole_in and report.ok:
        return f"ok, but not whole in {'; nor in '.join(report.not_whole_in)}"
    count = len(report.problems)
    return "ok" if report.ok else f"not ok: {count} problem{'s' if count > 1 else ''}"


def how_to_load(quant: BaseQuant) -> str:
    """One line: in what form of its base an adapter was trained, and what has to be served with it."""
    config = ", ".join(f"{key}={value!r}" for key, value in quant.to_hf().items())
    dense = f" (dense: {', '.join(quant.exclude)})" if quant.exclude else ""
    return (
        f"{quant.form} while it was trained{dense}: load it with BitsAndBytesConfig({config}), or serve it on what "
        "`slime-lora dequantize` writes"
    )


SHOWN = 8
"""Problems of one kind that people are shown: the wrong base of a model with experts makes thousands."""


def _shortened(problems: list[Problem]) -> list[str]:
    """The first problems (or warnings) of each kind, then how many more there are."""
    seen: Counter[str] = Counter()
    messages = []
    for problem in problems:
        seen[problem.kind] += 1
        if seen[problem.kind] <= SHOWN:
            messages.append(" ".join(problem.message.split()))
    more = {kind: count - SHOWN for kind, count in seen.items() if count > SHOWN}
    return messages + [f"{count:,} more of the kind {kind!r}; --json lists them all" for kind, count in more.items()]
