"""``slime-lora add-tokens``: argument text and printing; the work is in ``base.grow``."""

from __future__ import annotations

import argparse

from slime_plugins.lora.cli.arguments import check_out, place

NAME = "add-tokens"
HELP = "Write a base that knows new tokens: rows of embedding and head, tokenizer, config; the rest is linked."
EPILOG = """\
FILE has one token a line, or token<TAB>description. The tokenizer gives the ids; they are not where the embedding
ends, because vocabularies are padded. Tokens that the base has already are refused.

A new row starts as the mean of the rows of all known tokens; with a description, as the mean of its tokens' rows; or
as it is given, by a safetensors file with the rows of embedding and head, under the names that they have in the base,
in the order of FILE.

The files of weights without embedding and head are hard links: what changes one of them in place changes both
directories. On another file system they are symbolic links, and the base must stay. DIR appears when all of it is on
disk, or not at all. The last line printed is the path written. Needs transformers.

examples:
  slime-lora add-tokens --hf-checkpoint Qwen3-4B --tokens items.txt --out Qwen3-4B-items
  slime-lora add-tokens --hf-checkpoint Qwen3-4B --tokens items.txt --out Qwen3-4B-items --init rows.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("--hf-checkpoint", required=True, type=place, metavar="DIR", help="the base")
    parser.add_argument("--tokens", required=True, type=place, metavar="FILE", help="one token a line")
    parser.add_argument("--out", required=True, type=place, metavar="DIR", help="the new base: a new directory")
    parser.add_argument(
        "--init",
        type=place,
        metavar="HOW",
        help="mean, description, or a safetensors file (default: description where every line has one, else mean)",
    )


def run(args: argparse.Namespace) -> int:
    """Write the base; 0, or the error that ``cli.main`` prints."""
    from slime_plugins.lora.base.grow import DESCRIPTION, MEAN, add_tokens
    from slime_plugins.lora.base.tokens import read_tokens
    from slime_plugins.lora.errors import UsageError

    given = None if args.init in (None, MEAN, DESCRIPTION) else args.init
    if given is not None and not given.endswith(".safetensors"):
        raise UsageError(f"--init {given}: expected mean, description, or a .safetensors file")
    check_out("--out", args.out, {"--hf-checkpoint": args.hf_checkpoint, "--tokens": args.tokens, "--init": given})
    tokens = read_tokens(args.tokens)
    added = add_tokens(args.hf_checkpoint, tokens, args.out, init=args.init)
    first, last = min(added.ids), max(added.ids)
    inside = sum(number < added.rows_before for number in added.ids)
    print(f"{len(added.ids):,} tokens, ids {first} to {last}; rows start as: {added.init}")
    padding = f"; {inside:,} of the new rows were padding" if inside else ""
    print(f"{', '.join(added.matrices)}: {added.rows_before:,} -> {added.rows_after:,} rows{padding}")
    if added.init != DESCRIPTION and any(token.description for token in tokens):
        print(f"descriptions not used: --init {added.init}")
    linked = ", ".join(f"{count} by {how}" for how, count in added.links.items())
    print(f"files of weights taken over: {linked or 'none, all hold new rows'}")
    if "symbolic link" in added.links:
        print(f"{args.hf_checkpoint} must stay where it is: symbolic links point into it")
    print(args.out)
    return 0
