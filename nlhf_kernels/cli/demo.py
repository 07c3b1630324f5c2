"""`nlhf-kernels demo`: the summarisation experiment, from raw texts to a report.

A small model learns to summarise, three annotators with different tastes compare its answers, and Nash-MD, Nash-EMA,
IPO-MD and an RLHF baseline learn from that; then all play against all. Without arguments: docstrings of the installed
packages as texts, minutes on two CPU cores. The same with your own pairs (--data), model (--model) and size (--preset,
--set). An interrupted run goes on where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from ..core.optional import require
from ..core.terminal import Reporter, new_console
from .common import find_device, show_next

if TYPE_CHECKING:
    from ..experiment.presets import Preset

NEEDED = ("transformers", "accelerate", "tokenizers", "matplotlib")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="small", help="tiny, small (default) or gpu")
    parser.add_argument("--out", type=Path, default=Path(".demo"), help="folder of the experiment (default .demo)")
    parser.add_argument("--restart", action="store_true", help="start over in a folder that holds an experiment")
    data = parser.add_argument_group("your own data and model, in place of docstrings and a small model from nothing")
    data.add_argument("--data", help="pairs with prompt, chosen, rejected: .jsonl, .json, .csv, a folder, a hub name")
    data.add_argument("--split", help="part of a hub data set (default train)")
    data.add_argument("--model", help="causal language model: a folder or a hub name, safetensors only")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change one number of the preset; repeatable"
    )
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")


def run(arguments: argparse.Namespace) -> int:
    require("nlhf-kernels demo", NEEDED, "train,plots")
    from ..experiment import Experiment, Material, Preset, overridden

    arguments.option_names.update({field.name: f"--set {field.name}" for field in dataclasses.fields(Preset)})
    device = find_device("demo", arguments.device)
    preset = overridden(_preset(arguments.preset), arguments.set)
    material = Material(arguments.data, arguments.split, arguments.model)
    report = Reporter(new_console(stderr=True))
    experiment = Experiment(arguments.out, preset, material, device, report, arguments.restart)
    results = experiment.run()
    folder = experiment.write(results)
    _show(results, folder)
    if arguments.data is None:
        own = ["--data", "pairs.jsonl", "--model", "OWNER/NAME", "--out", "runs/mine"]
        show_next(["nlhf-kernels", "demo", *own])
    return 0


def resume_hint(arguments: argparse.Namespace) -> str:
    stages = arguments.out.glob("**/stage.json")
    if not any(stages):
        return "no stage was finished"
    command = "the same command without --restart" if arguments.restart else "the same command"
    return f"{command} goes on after the last finished stage"


def _preset(name: str) -> Preset:
    from ..core.checks import check_option
    from ..experiment.presets import PRESETS

    return PRESETS[check_option("demo", "--preset", name, tuple(PRESETS))]


def _show(results: dict[str, Any], folder: Path) -> None:
    from ..experiment.figures import judges
    from ..experiment.report import describe_claim, describe_cycles, describe_intervals, describe_speed

    console = new_console()
    facts = results["tournament"]
    for judge, each in judges(results).items():
        console.print(_matrix(judge, facts["labels"], each["matrix"]))
        for claim in each["claims"]:
            console.print(describe_claim(claim))
        console.print()
    for line in (describe_intervals(results), *describe_cycles(results)):
        console.print(line)
    for line in describe_speed(results):
        console.print(f"Speed: {line}")
    total = sum(results["seconds"].values())
    print(f"{total:.0f} seconds of work\nNumbers: {folder / 'results.json'}\nReport: {folder / 'report.html'}")


def _matrix(judge: str, labels: list[str], matrix: list[list[dict[str, float] | None]]) -> Table:
    """Means only, to fit a terminal: the report has the intervals."""
    title = f"Win rate of row against column, judged by {judge} (*: the 95 % interval leaves out 1/2)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1))
    table.add_column("")
    for number in range(1, len(labels) + 1):
        table.add_column(str(number), justify="right")
    for number, (name, row) in enumerate(zip(labels, matrix, strict=True), start=1):
        table.add_row(f"{number} {name}", *map(_cell, row))
    return table


def _cell(cell: dict[str, float] | None) -> str:
    if cell is None:
        return ""
    return f"{cell['mean']:.2f}{'*' if abs(cell['mean'] - 0.5) > cell['half'] else ' '}"
