"""`nlhf-kernels`: one subcommand a file, each with `add_arguments(parser)` and `run(arguments) -> exit code`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .. import __version__
from . import demo, evaluate, info, prefer, sample, tabular, train

COMMANDS = {
    "info": info,
    "demo": demo,
    "tabular": tabular,
    "sample": sample,
    "prefer": prefer,
    "train": train,
    "evaluate": evaluate,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="nlhf-kernels", description="Nash Learning from Human Feedback at kernel speed"
    )
    parser.add_argument("--version", action="version", version=f"nlhf-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        help_line = (module.__doc__ or "").partition(": ")[2].partition(".")[0]
        module.add_arguments(commands.add_parser(name, help=help_line, description=module.__doc__))
    arguments = parser.parse_args(argv)
    return int(COMMANDS[arguments.command].run(arguments))
