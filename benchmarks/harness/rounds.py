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
from .gate import short_reason
from .machine import without_paths
from .report import print_results
from .results import ResultRow, RowKey, append_rows, measured_keys
from .runner import Job, Settings, open_run, run_facts
from .timing import TimingPlan

#: (shape, context, plan), and with groups the names of the group -> rows.
RunShape = Callable[..., list[ResultRow]]
Groups = Callable[[Shape, torch.device], Sequence[Sequence[str]]]


def build_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--preset", choices=PRESETS, default="standard", help="tiny: a smoke test")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of all rivals in turn (default 5)")
    parser.add_argument("--shape", nargs="+", type=name_and_value, metavar="NAME=VALUE", default=[], help="only these")
    parser.add_argument("--rival", nargs="*", metavar="NAME", help="only these beside ours (default: all)")
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
    groups: Groups | None = None,
) -> list[ResultRow]:
    """Measure every shape of the preset that fits the device, print and append its rows at once, the table last.

    With `groups`, the implementations of a shape are measured group by group, each with its rows appended: those of a
    shape may take longer than the time there is.
    """
    console = Console(width=120)
    if arguments.resume and arguments.out is None:
        raise SystemExit(f"benchmarks.{name}: --resume: expected --out, whose rows are left out; got none")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    finished = measured_keys(arguments.out, run_facts(device, arguments.preset, {})) if arguments.resume else []
    jobs = []
    for shape in presets.get(arguments.preset, ()):
        if device.type not in shape.devices or not shape.matches(dict(arguments.shape)):
            continue
        done = {key.implementation for key in finished if (key.case, key.shape, key.dtype) == (name, *shape.identity)}
        if groups is not None:
            jobs += [(shape, (group,)) for group in groups(shape, device) if not done.issuperset(group)]
        elif not done:
            jobs.append((shape, ()))
    if not jobs:
        console.print(f"{name}: nothing is left to measure here at preset {arguments.preset}")
        return []
    case = SimpleNamespace(name=name)
    context = open_run(Settings(device, arguments.preset), [Job(case, shape) for shape, _ in jobs])
    repeats = 1 if arguments.preset == "tiny" else arguments.repeats
    plan = TimingPlan(0.0, repeats, repeats, warmups=1, batch_s=0.0, flush_bytes=0)
    rows: list[ResultRow] = []
    for shape, group in jobs:
        try:
            shape_rows = run_shape(shape, context, plan, *group)
        except Exception as error:  # out of memory or a compiler's, say: the other shapes and groups still run
            key = RowKey(name, shape.label, shape.dtype, "full", "case", device.type, context.threads)
            shape_rows = [ResultRow(key, "case", "failed", context.facts, (without_paths(short_reason(error)),))]
        show(shape, shape_rows, console)
        rows += shape_rows
        if arguments.out is not None:
            append_rows(arguments.out, shape_rows)
    print_results([row for row in rows if row.kind != "part"], console)
    return rows
