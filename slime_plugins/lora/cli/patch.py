"""``slime-lora patch``: put the plugin into a slime checkout, and take it out again."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slime_plugins.lora.slime.patch.checkout import Plan

NAME = "patch"
HELP = "put the plugin into a slime checkout, and take it out again"
EPILOG = """\
Examples:
  slime-lora patch check --slime ~/slime     is every seam there? is it applied? changes nothing
  slime-lora patch apply --slime ~/slime     link the plugin and insert a few marked lines
  slime-lora patch apply --slime ~/slime --copy
                                             copy instead: for a checkout that is shipped to other machines
  slime-lora patch diff --slime ~/slime      the same edit as a patch for git apply
  slime-lora patch revert --slime ~/slime    take all of it out again, byte for byte

Exit codes: 0 done (check: the checkout can be or is patched), 1 refused, 2 wrong usage."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this verb."""
    parser.add_argument("action", choices=("check", "apply", "revert", "diff"))
    parser.add_argument("--slime", required=True, metavar="DIR", help="the slime checkout")
    parser.add_argument("--copy", action="store_true", help="apply: copy the plugin instead of linking it")
    parser.add_argument("--force", action="store_true", help="revert: delete a copied plugin that has been changed")


def run(args: argparse.Namespace) -> int:
    """Do it and say what was done. Raises as ``checkout``'s functions do."""
    from slime_plugins.lora.errors import UsageError
    from slime_plugins.lora.slime.patch import checkout

    if args.copy and args.action != "apply":
        raise UsageError(f"--copy is for apply, not {args.action}")
    if args.force and args.action != "revert":
        raise UsageError(f"--force is for revert, not {args.action}")
    if args.action == "revert":
        root = checkout.root_of(args.slime)
        done = checkout.revert(root, force=args.force)
    else:
        made = checkout.plan(args.slime)
        root = made.root
        if args.action == "check":
            return _check(made)
        if args.action == "diff":
            print(checkout.diff(made), end="")
            return 0
        dirty = checkout.dirty_files(root)
        done = checkout.apply(made, copy=args.copy)
        if dirty:
            _warn(f"{root} has uncommitted changes: {_listed(dirty)}")
    left = checkout.lines_left(root)
    if left:
        _warn(f"a line that has our mark or names slime_lora, but is none of ours, is left as it is: {_listed(left)}")
    for line in done:
        print(line)
    if not done:
        print(
            "nothing to do: applied already" if args.action == "apply" else "nothing to do: nothing of ours is there"
        )
    print(root)
    return 0


def _warn(message: str) -> None:
    print(f"slime-lora: warning: {message}", file=sys.stderr)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _check(made: Plan) -> int:
    from slime_plugins.lora.slime.patch import checkout, plugin
    from slime_plugins.lora.slime.patch.seams import SEAMS

    for seam in SEAMS:
        state = made.problems.get(seam.name)
        state = f"MISSING  {state}" if state else "not in this version" if seam.name in made.absent else "found"
        print(f"{seam.name:34s} {state}")
    edits = "in place" if made.applied else "out of date: apply again" if made.touched else "not applied"
    print(f"{'edits':34s} {edits}")
    state = plugin.state(made.root)
    print(f"{'slime_plugins/lora':34s} {state}")
    obstacle = checkout.reason_against(made, copy=state == "copy")
    if obstacle:
        print(f"{'in the way':34s} {obstacle}")
    for path in checkout.dirty_files(made.root):
        print(f"{'uncommitted change':34s} {path}")
    for place in checkout.lines_left(made.root):
        print(f"{'not a line of ours':34s} {place}")
    return 1 if made.problems or obstacle else 0
