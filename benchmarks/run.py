"""Run benchmarks, compare two result files, draw plots: `python -m benchmarks.run --help`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.cases import all_cases
from benchmarks.harness.case import PRESETS, Case, name_and_value
from benchmarks.harness.compare import compare, machine_differences
from benchmarks.harness.library import BACKENDS
from benchmarks.harness.plots import write_plots
from benchmarks.harness.report import print_comparison, print_results
from benchmarks.harness.results import ResultRow, append_rows, measured_shapes, read_rows
from benchmarks.harness.runner import Job, RunContext, Settings, open_run, run_facts, run_job, select_jobs
from benchmarks.harness.timing import answers
from benchmarks.targets import headline_modes

LOG_WIDTH = 120
BAD_STATUSES = ("red", "failed")
PRESET_HELP = "tiny: a smoke test, hot caches; headline: the standard shapes of benchmarks/targets.py, briefly"


def _threads(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of threads of at least 1, got {text!r}")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--list", action="store_true", help="name the cases and their shapes, run nothing")
    parser.add_argument("--case", nargs="+", metavar="NAME", default=[], help="cases to run (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--preset", choices=PRESETS, default="standard", help=PRESET_HELP)
    parser.add_argument(
        "--shape", nargs="+", type=name_and_value, metavar="NAME=VALUE", default=[], help="only these sizes"
    )
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=[], help="default: all that can run")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes a while)")
    parser.add_argument("--threads", type=_threads, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append the rows to this file")
    parser.add_argument("--resume", action="store_true", help="leave out what --out holds of this commit and preset")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="compare two result files")
    parser.add_argument("--fail-above", type=float, default=1.10, metavar="RATIO", help="of new to old; default 1.10")
    parser.add_argument("--plot", type=Path, metavar="RESULTS", help="draw a result file")
    parser.add_argument("--plot-dir", type=Path, metavar="DIR", help="where to (default: beside the result file)")
    return parser


def run_comparison(old_path: Path, new_path: Path, fail_above: float, console: Console) -> int:
    old, new = read_rows(old_path), read_rows(new_path)
    changes = compare(old, new, fail_above)
    print_comparison(changes, machine_differences(old, new), console)
    bad = sum(change.is_bad for change in changes)
    console.print(f"{len(changes)} rows compared, {bad} worse (threshold {fail_above:g}x)")
    return 1 if bad else 0


def run_plots(results: Path, folder: Path | None, console: Console) -> int:
    written = write_plots(read_rows(results), folder or results.parent)
    for path in written:
        console.print(str(path), soft_wrap=True)
    return 0 if written else 1


def print_cases(cases: Sequence[Case], console: Console) -> int:
    for case in cases:
        console.print(f"[bold]{case.name}[/bold] ({', '.join(case.modes)})")
        for preset, shapes in case.shapes.items():
            for shape in shapes:
                devices = "" if len(shape.devices) > 1 else f" ({shape.devices[0]} only)"
                modes = f" ({', '.join(shape.modes)})" if shape.modes else ""
                console.print(f"  {preset}: {shape.label} {shape.dtype}{modes}{devices}", markup=False)
    return 0


def run_jobs(jobs: Sequence[Job], context: RunContext, out: Path | None, console: Console) -> list[ResultRow]:
    """Return every job's rows, written after each job, so that an interrupted run is not lost. A device that takes no
    more work ends them."""
    rows: list[ResultRow] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        total = sum(len(job.case.modes_at(job.shape)) for job in jobs)
        task = progress.add_task("starting", total=total)
        for job in jobs:
            started = 0

            def show(mode: str, job: Job = job) -> None:
                nonlocal started
                progress.update(task, advance=min(started, 1))  # the previous mode is done
                started += 1
                progress.update(task, description=f"{job.case.name} {job.shape.label} {job.shape.dtype} {mode}")

            new = run_job(job, context, show)
            progress.update(task, advance=1)
            rows += new
            if out is not None:
                append_rows(out, new)
            if not answers(context.settings.device):
                break
    return rows


def run_benchmarks(arguments: argparse.Namespace, cases: Sequence[Case], console: Console) -> int:
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        console.print("--device: expected cpu, for this machine shows PyTorch no GPU; got cuda")
        return 2
    settings = Settings(
        device, arguments.preset, tuple(arguments.backend), dict(arguments.shape), not arguments.no_compile
    )
    jobs = select_jobs(cases, settings, headline_modes())
    if not jobs:
        console.print(f"no shape of {', '.join(case.name for case in cases)} matches; --list shows all")
        return 2
    if arguments.resume:
        measured = measured_shapes(arguments.out, run_facts(device, settings.preset, {}))
        jobs = [job for job in jobs if (job.case.name, *job.shape.identity) not in measured]
        if not jobs:
            console.print(f"everything has been measured: {arguments.out}", soft_wrap=True)
            return 0
    threads_before = torch.get_num_threads()
    try:
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        rows = run_jobs(jobs, open_run(settings, jobs), arguments.out, console)
    finally:
        torch.set_num_threads(threads_before)
    print_results(rows, console)
    if answers(device):
        return 1 if any(row.status in BAD_STATUSES for row in rows) else 0
    console.print("the GPU takes no more work of this process")
    if arguments.resume:
        os.execv(sys.executable, sys.orig_argv)  # a new process measures the rest
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)  # rich assumes 80 columns for a pipe and would cut the tables
    if arguments.fail_above < 1.0:
        parser.error(f"--fail-above: expected a ratio of at least 1, got {arguments.fail_above}")
    if arguments.resume and arguments.out is None:
        parser.error("--resume: expected --out, whose rows are left out; got none")
    try:
        if arguments.compare:
            old, new = arguments.compare
            return run_comparison(old, new, arguments.fail_above, console)
        if arguments.plot:
            return run_plots(arguments.plot, arguments.plot_dir, console)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    registry = all_cases()
    unknown = [name for name in arguments.case if name not in registry]
    if unknown:
        parser.error(f"--case: expected some of {', '.join(registry)}; got {', '.join(unknown)}")
    cases = [registry[name] for name in arguments.case or registry]
    return print_cases(cases, console) if arguments.list else run_benchmarks(arguments, cases, console)


if __name__ == "__main__":
    sys.exit(main())
