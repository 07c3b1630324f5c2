"""`nlhf-kernels demo`: the experiment, from its annotators to a report.

Two tasks. "candidates" (the default): annotators whose tastes run in circles more or less, a small language model that
answers with one of a few words, and RLHF, Nash-MD and others that learn from the same votes; every policy's win rates
and exploitability are exact. "texts" (the default with --data or --model): a model learns to summarise docstrings, or
to answer your own pairs' prompts, and every contestant is compared with every other. Minutes on two CPU cores; other
sizes with --preset and --set. An interrupted run goes on where it was when the same command is given again.
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
    from ..experiment import Experiment
    from ..experiment.candidates import CandidateExperiment

TASKS = ("candidates", "texts")
NEEDED = ("transformers", "accelerate", "tokenizers", "matplotlib")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=TASKS, help="default: texts with --data or --model, else candidates")
    parser.add_argument("--preset", default="small", help="of the task: tiny, small (default), standard or gpu")
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
    device = find_device("demo", arguments.device)
    candidates = _is_candidates(arguments)
    experiment = (_candidates if candidates else _texts)(arguments, device, Reporter(new_console(stderr=True)))
    results = experiment.run()
    folder = experiment.write(results)
    (_show_candidates if candidates else _show_texts)(results)
    total = sum(results["seconds"].values())
    print(f"{total:.0f} seconds of work\nNumbers: {folder / 'results.json'}\nReport: {folder / 'report.html'}")
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


def _is_candidates(arguments: argparse.Namespace) -> bool:
    own = {f"--{name}": getattr(arguments, name) for name in ("data", "split", "model")}
    option = next((name for name, value in own.items() if value is not None), None)
    if arguments.task == "candidates" and option is not None:
        raise ValueError(f"demo: {option}: expected with --task texts; got {own[option]!r} with --task candidates")
    return option is None if arguments.task is None else bool(arguments.task == "candidates")


def _candidates(arguments: argparse.Namespace, device: Any, report: Reporter) -> CandidateExperiment:
    from ..experiment import overridden
    from ..experiment.candidates import CANDIDATE_PRESETS, CandidateExperiment

    preset = overridden(_preset(arguments, CANDIDATE_PRESETS), arguments.set)
    return CandidateExperiment(arguments.out, preset, device, report, arguments.restart)


def _texts(arguments: argparse.Namespace, device: Any, report: Reporter) -> Experiment:
    from ..experiment import PRESETS, Experiment, Material, overridden

    preset = overridden(_preset(arguments, PRESETS), arguments.set)
    material = Material(arguments.data, arguments.split, arguments.model)
    return Experiment(arguments.out, preset, material, device, report, arguments.restart)


def _preset(arguments: argparse.Namespace, presets: dict[str, Any]) -> Any:
    from ..core.checks import check_option

    chosen = presets[check_option("demo", "--preset", arguments.preset, tuple(presets))]
    arguments.option_names.update({field.name: f"--set {field.name}" for field in dataclasses.fields(chosen)})
    return chosen


def _show_candidates(results: dict[str, Any]) -> None:
    from ..experiment.candidates.report import answer, describe_claim, describe_setting, tables

    console = new_console()
    for sentence in answer(results):
        console.print(sentence)
    for claim in results["claims"]:
        console.print(describe_claim(claim))
    for title, head, rows in tables(results)[:4]:
        shown = Table(
            title=f"{title} (means; the report has intervals)", title_justify="left", box=box.SIMPLE, padding=(0, 1)
        )
        for number, name in enumerate(head):
            shown.add_column(name.partition(",")[0], no_wrap=number == 0)
        for row in rows:
            shown.add_row(*(cell.partition("\u00a0±")[0] for cell in row))
        console.print(shown)
    console.print(describe_setting(results))


def _show_texts(results: dict[str, Any]) -> None:
    from ..experiment.figures import judges, nats
    from ..experiment.report import (
        answer,
        describe_claim,
        describe_cycles,
        describe_distance,
        describe_intervals,
        describe_speed,
    )

    console = new_console()
    facts = results["tournament"]
    for sentence in answer(results):
        console.print(sentence)
    for judge, each in judges(results).items():
        console.print(_matrix(f"{judge}, at {nats(results)}", facts["labels"], each["matrix"]))
        for claim in each["claims"]:
            console.print(describe_claim(claim))
        console.print()
    for line in (describe_distance(results), describe_intervals(results), *describe_cycles(results)):
        console.print(line)
    for line in describe_speed(results):
        console.print(f"Speed: {line}")


def _matrix(judge: str, labels: list[str], matrix: list[list[dict[str, float] | None]]) -> Table:
    """Build a table of the means alone, which fits a terminal; the intervals are in the report."""
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
    return f"{cell['mean']:.2f}{'*' if abs(cell['mean'] - 0.5) > cell['half'] + 1e-9 else ' '}"
