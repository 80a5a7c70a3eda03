"""``slime-lora``: one module per verb, each with NAME, HELP, EPILOG, add_arguments(parser) and run(args) -> int.

Verb modules import torch, megatron and the like inside ``run`` only, so that ``--help`` answers at once.
Exit codes: 0 done, 1 the thing read or checked is bad, 2 wrong usage, 130 interrupted (Ctrl-C), 141 the reader went
away, 143 terminated (SIGTERM).
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from slime_plugins.lora.errors import UsageError
from slime_plugins.lora.version import __version__

VERBS = (
    *("rehearse", "export", "import_", "merge", "verify", "convert_zero", "history", "plan", "dequantize"),
    *("patch", "doctor"),
)
"""Module names in this package, in the order in which the help lists them."""

EXTRAS = {
    "rehearsal": ("megatron", "transformers", "peft", "accelerate", "ray", "matplotlib", "tensorboard", "rich"),
    "quant": ("bitsandbytes",),
}
"""Which pip extra brings a third-party package that a verb may not find."""


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors: the usage text is a --help away."""

    def error(self, message: str):
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code and never raises for a user's mistake (unless --debug)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        code = _dispatch(argv)
        sys.stdout.flush()  # a reader that went away shows up here, not in the interpreter's exit
        return code
    except BrokenPipeError:
        # Keep the interpreter's own flush at exit from failing on the same pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as interrupt:
        code = getattr(interrupt, "exit_code", 130)  # a verb that turns SIGTERM into one says 143
        what = "interrupted" if code == 130 else "terminated"
        print(f"slime-lora: {'; '.join([what, *map(str, filter(None, interrupt.args))])}", file=sys.stderr)
        return code
    except (ValueError, OSError, ModuleNotFoundError) as error:
        message = _one_line(error)
        if debug or message is None:
            raise
        print(f"slime-lora: error: {message}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _dispatch(argv: list[str]) -> int:
    parser = _build_parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit:  # how argparse ends --help and --version
        return 0
    if args.verb is None:
        parser.print_help()
        return 0
    return args.run(args)


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="slime-lora",
        description="LoRA adapters for slime's Megatron training: train, export, check, convert.",
        epilog="slime-lora VERB --help explains a verb, with examples.",
    )
    parser.add_argument("--version", action="version", version=f"slime-lora {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    for module in _verb_modules():
        verb = subparsers.add_parser(
            module.NAME,
            help=module.HELP,
            description=module.HELP,
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        # SUPPRESS: without it the verb's default would overwrite a --debug given before the verb.
        verb.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        module.add_arguments(verb)
        verb.set_defaults(run=module.run)
    return parser


def _verb_modules() -> list[ModuleType]:
    return [importlib.import_module(f"{__name__}.{name}") for name in VERBS]


def _one_line(error: Exception) -> str | None:
    """The error as one line, or None where it is not the user's to mend and the traceback should show."""
    if isinstance(error, ModuleNotFoundError):
        missing = (error.name or "").partition(".")[0]
        for extra, packages in EXTRAS.items():
            if missing in packages:
                return f"this needs the package {missing!r}, which is not installed: pip install 'slime-lora[{extra}]'"
        return None
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
