"""``slime-lora history``: a run's validations, as a table and as a picture. Argument text and printing only."""

from __future__ import annotations

import argparse

from slime_plugins.lora.cli.arguments import place

NAME = "history"
HELP = "Show a run's validations: metrics, learning rate, what was decided, which was the best."
EPILOG = """\
FILE is the training_history.json that a run leaves in --save (a rehearsal without --save: in --out), or the directory
that it lies in. The picture needs matplotlib.

examples:
  slime-lora history runs/math
  slime-lora history runs/math/training_history.json --png math.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("file", type=place, metavar="FILE", help="training_history.json, or its directory")
    parser.add_argument("--png", type=place, metavar="OUT", help="draw it, too")


def run(args: argparse.Namespace) -> int:
    """Print the table; 0, or the error that ``cli.main`` prints."""
    from pathlib import Path

    from slime_plugins.lora.control import curves, history

    path = Path(args.file)
    path = path / history.FILE if path.is_dir() else path
    found = history.load(path)
    print(curves.table(found))
    if args.png:
        curves.draw(found, args.png, path.resolve().parent.name)
        print(args.png)
    return 0
