"""``slime-lora doctor``: argument text and printing; the checks are in ``slime.checkup``."""

from __future__ import annotations

import argparse

NAME = "doctor"
HELP = "before a launch: versions, the checkout's seams, and what these launch arguments would be refused for"
EPILOG = """\
Starts nothing and needs neither a GPU nor slime; what could not be checked is said. One line per finding.

Examples:
  slime-lora doctor                          versions of what is installed
  slime-lora doctor --slime ~/slime          also: is every seam there, are the edits in place?
  slime-lora doctor --slime ~/slime -- --use-lora --lora-sync adapter --num-layers 36 ...
                                             also: the arguments of the launch script, as train.py gets them

Exit codes: 0 nothing stands in the way, 1 something does, 2 wrong usage."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this verb."""
    parser.add_argument("--slime", metavar="DIR", help="the slime checkout")
    parser.add_argument("launch", nargs="*", metavar="-- ARGS", help="what the launch script gives to train.py")


def run(args: argparse.Namespace) -> int:
    """Print the findings; 0 if none of them stands in the way."""
    from slime_plugins.lora.slime.checkup import checkup

    findings = checkup(args.slime, args.launch)
    for finding in findings:
        print(f"{finding.state:8s} {finding.about:12s} {finding.text}")
    wrong = sum(finding.state == "WRONG" for finding in findings)
    print("ok" if not wrong else f"not ok: {wrong} finding{'s' if wrong > 1 else ''}")
    return 1 if wrong else 0
