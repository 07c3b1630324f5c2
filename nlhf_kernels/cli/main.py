"""`nlhf-kernels`: one subcommand per file, each with `add_arguments(parser)` and `run(arguments) -> exit code`.

A subcommand raises exceptions; `errors.finish` turns them into a line and an exit code. The optional
`resume_hint(arguments)` returns how to resume. `NAMES` maps arguments of the library to options of another name.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from .. import __version__
from . import demo, errors, evaluate, info, merge, plan, prefer, sample, tabular, train, tune
from .common import Help

COMMANDS = {
    "info": info,
    "demo": demo,
    "tabular": tabular,
    "sample": sample,
    "prefer": prefer,
    "train": train,
    "plan": plan,
    "evaluate": evaluate,
    "merge": merge,
    "tune": tune,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return errors.REFUSED
    module: Any = COMMANDS[arguments.command]
    resume_hint = getattr(module, "resume_hint", lambda arguments: "nothing was written")
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        return errors.finish(lambda: module.run(arguments), arguments, resume_hint, arguments.option_names)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nlhf-kernels",
        description="Nash Learning from Human Feedback at kernel speed.",
        epilog="exit codes:\n" + "".join(f"  {code:<4}{meaning}\n" for code, meaning in errors.CODES.items()),
        formatter_class=Help,
    )
    parser.add_argument("--version", action="version", version=f"nlhf-kernels {__version__}")
    parser.add_argument("--traceback", action="store_true", help="with an error, show where in the code it arose")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands (each has --help)")
    for name, module in COMMANDS.items():
        help_line = (module.__doc__ or "").partition(": ")[2].partition(".")[0]
        subparser = commands.add_parser(name, help=help_line, description=module.__doc__, formatter_class=Help)
        module.add_arguments(subparser)
        names = errors.option_names(subparser) | getattr(module, "NAMES", {})
        subparser.set_defaults(option_names=names)
    return parser


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"nlhf-kernels: warning: {message}", file=sys.stderr)
