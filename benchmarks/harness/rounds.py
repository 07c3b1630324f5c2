"""The command line of benchmarks that time whole loops, alternating between rivals, instead of one call of an op."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console

from .case import PRESETS, Shape, name_and_value
from .report import print_results
from .results import ResultRow, append_rows, measured_shapes
from .runner import Job, RunContext, Settings, open_run, run_facts
from .timing import TimingPlan

RunShape = Callable[[Shape, RunContext, TimingPlan], list[ResultRow]]


def build_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--preset", choices=PRESETS, default="standard", help="tiny: a smoke test")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of all rivals in turn (default 5)")
    parser.add_argument("--shape", nargs="+", type=name_and_value, metavar="NAME=VALUE", default=[], help="only these")
    parser.add_argument("--rival", nargs="+", metavar="NAME", help="only these beside ours (default: all)")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append the rows to this file")
    parser.add_argument("--resume", action="store_true", help="leave out what --out holds of this commit and preset")
    return parser


def check_rivals(name: str, rivals: Sequence[str] | None, available: Iterable[str]) -> None:
    if unknown := set(rivals or ()) - set(available):
        raise SystemExit(
            f"benchmarks.{name}: --rival: expected some of {', '.join(available)}; got {', '.join(unknown)}"
        )


def run_rounds(
    name: str,
    arguments: argparse.Namespace,
    presets: Mapping[str, Sequence[Shape]],
    run_shape: RunShape,
    show: Callable[[Shape, list[ResultRow], Console], Any],
) -> list[ResultRow]:
    """Measure every shape of the preset that fits the device, print and append its rows at once, the table last."""
    console = Console(width=120)
    if arguments.resume and arguments.out is None:
        raise SystemExit(f"benchmarks.{name}: --resume: expected --out, whose rows are left out; got none")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    finished = measured_shapes(arguments.out, run_facts(device, arguments.preset, {})) if arguments.resume else set()
    shapes = [
        shape
        for shape in presets.get(arguments.preset, ())
        if device.type in shape.devices
        and shape.matches(dict(arguments.shape))
        and (name, *shape.identity) not in finished
    ]
    if not shapes:
        console.print(f"{name}: nothing is left to measure here at preset {arguments.preset}")
        return []
    case = SimpleNamespace(name=name)
    context = open_run(Settings(device, arguments.preset), [Job(case, shape) for shape in shapes])
    repeats = 1 if arguments.preset == "tiny" else arguments.repeats
    plan = TimingPlan(0.0, repeats, repeats, warmups=1, batch_s=0.0, flush_bytes=0)
    rows: list[ResultRow] = []
    for shape in shapes:
        shape_rows = run_shape(shape, context, plan)
        show(shape, shape_rows, console)
        rows += shape_rows
        if arguments.out is not None:
            append_rows(arguments.out, shape_rows)
    print_results([row for row in rows if row.kind != "part"], console)
    return rows
