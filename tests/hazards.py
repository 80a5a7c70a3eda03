"""Break the code on purpose, once per hazard of docs/design.md, and see the tests go red.

    python tests/hazards.py            # all; some 30 s each on 2 cores
    python tests/hazards.py 3 19       # by hazard number; 4bit: of a 4-bit base; real: on real slime, if set up
    python tests/hazards.py --list

The entries are in tests/breaks, by the room of what they break. Each names a function, changes it in a copy of the
tree and runs the tests named. A function that is not there, or has not got the text once, is an error, not a pass.
Exit 0: every broken copy failed its tests. The tree is not touched.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from breaks import checkpoint, files, layers, package, training
from breaks.entry import Break

ROOT = Path(__file__).resolve().parent.parent


def _place(item: Break) -> tuple[int, str]:
    """Numbers first and in order, then words."""
    number = re.fullmatch(r"\d+", item.hazard)
    return (int(item.hazard), "") if number else (sys.maxsize, item.hazard)


BREAKS = sorted((item for room in (layers, package, checkpoint, files, training) for item in room.BREAKS), key=_place)


def run(item: Break) -> bool:
    """Did the tests fail on the broken copy?"""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory, "tree")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "out"))
        target = copy / item.file
        broken = item.applied(target.read_text())
        if "_PRIVATE" in item.new:
            broken += "\n\n_PRIVATE = torch.Generator().manual_seed(0)\n"
        target.write_text(broken)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-W",
            "ignore",
            "-p",
            "no:cacheprovider",
            *item.tests.split(),
        ]
        paths = os.pathsep.join([str(copy), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HAZARDS_TREE": str(copy)}
        result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    last = (result.stdout.strip().splitlines() or ["no output"])[-1]
    red = result.returncode == 1
    print(f"{'red ' if red else 'GREEN'}  hazard {item.hazard:>2}: {item.what}  [{item.tests}] {last}", flush=True)
    return red


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hazards", nargs="*", help="hazard numbers; default all")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    known = {item.hazard for item in BREAKS}
    if unknown := [name for name in args.hazards if name not in known]:
        parser.error(
            f"no such hazard: {', '.join(unknown)}; there are {', '.join(dict.fromkeys(i.hazard for i in BREAKS))}"
        )
    chosen = [item for item in BREAKS if not args.hazards or item.hazard in args.hazards]
    if args.list:
        print("\n".join(f"{item.hazard:>2}  {item.what}  ({item.where})" for item in chosen))
        return 0
    for item in chosen:
        if item.needs and not os.environ.get(item.needs):
            print(f"not run: {item.what}: set {item.needs} (tests/slime/real/conftest.py)")
    verdicts = [run(item) for item in chosen if not item.needs or os.environ.get(item.needs)]
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
