"""``slime-lora patch``: put the plugin into a slime checkout, and take it out again."""

from __future__ import annotations

import argparse
import sys

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
    made = checkout.plan(args.slime)
    if args.action == "check":
        return _check(made)
    if args.action == "diff":
        print(checkout.diff(made), end="")
        return 0
    if args.action == "apply":
        dirty = checkout.dirty_files(made.root)
        if dirty and not made.problems:
            listed = ", ".join(dirty[:5]) + (f" and {len(dirty) - 5} more" if len(dirty) > 5 else "")
            print(f"slime-lora: warning: {made.root} has uncommitted changes: {listed}", file=sys.stderr)
        done = checkout.apply(made, copy=args.copy)
    else:
        done = checkout.revert(made.root, force=args.force)
    for line in done:
        print(line)
    if not done:
        print(
            "nothing to do: applied already" if args.action == "apply" else "nothing to do: nothing of ours is there"
        )
    print(made.root)
    return 0


def _check(made) -> int:
    from slime_plugins.lora.slime.patch import checkout
    from slime_plugins.lora.slime.patch.seams import SEAMS

    for seam in SEAMS:
        state = made.problems.get(seam.name)
        state = f"MISSING  {state}" if state else "not in this version" if seam.name in made.absent else "found"
        print(f"{seam.name:34s} {state}")
    edits = "in place" if made.applied else "out of date: apply again" if made.touched else "not applied"
    print(f"{'edits':34s} {edits}")
    print(f"{'slime_plugins/lora':34s} {checkout.plugin_state(made.root)}")
    for path in checkout.dirty_files(made.root):
        print(f"{'uncommitted change':34s} {path}")
    return 1 if made.problems else 0
