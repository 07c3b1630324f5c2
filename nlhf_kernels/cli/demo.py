"""`nlhf-kernels demo`: games solved, and the kernels' speed-up on this machine.

Nash-MD, with the paper's decreasing steps and with a constant one, and plain self-play mirror descent play random
preference games and rock-paper-scissors; exploitability says who approaches the regularised Nash equilibrium. On the
cycle, a large constant step circles for ever and the decreasing steps converge, as the theorem promises. Ends with the
figure's path and the time of the kernels beside that of the PyTorch reference on the same games.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..core.checks import check_integer, check_number
from ..core.registry import explain
from ..ops import mirror_descent
from ..tabular import PreferenceGame, cyclic_game, exploitability, plots, random_games, solve

REPORTS = 12  # times each algorithm is measured on its way
#: Name -> algorithm and options. The step 1 converges on random games and circles for ever on rock-paper-scissors.
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Nash-MD, steps 2/(tau(t+2))": ("nash-md", {}),
    "Nash-MD, step 1": ("nash-md", {"step": 1.0}),
    "self-play, step 1": ("omd", {"step": 1.0}),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--games", type=int, default=1024, help="random games (default 1024)")
    parser.add_argument("--actions", type=int, default=64, help="actions of a random game (default 64)")
    parser.add_argument("--steps", type=int, default=4096, help="steps of every algorithm (default 4096)")
    parser.add_argument("--tau", type=float, default=0.02, help="strength of the pull to the reference (default 0.02)")
    parser.add_argument("--out", type=Path, default=Path(".demo"), help="folder for the figure (default .demo)")


def run(arguments: argparse.Namespace) -> int:
    for name in ("games", "actions", "steps"):
        check_integer("demo", f"--{name}", getattr(arguments, name), 1, 10**6)
    tau = check_number("demo", "--tau", arguments.tau, 0.0, open_low=True)
    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    suites = {
        f"{arguments.games} random games, {arguments.actions} actions": random_games(
            arguments.games, arguments.actions
        ),
        "rock-paper-scissors": cyclic_game(),
    }
    curves = {}
    with _progress(console) as progress:
        for title, preference in suites.items():
            reference = torch.linspace(2, 0, preference.shape[-1], dtype=preference.dtype, device=device).softmax(-1)
            game = PreferenceGame(preference.to(device), reference, tau)
            curves[title] = _play(title, game, arguments.steps, progress)
    for title, curve in curves.items():
        console.print(_curve_table(title, curve))
    console.print(_figure_line(curves, tau, arguments.out))
    console.print(_speed_line(next(iter(suites.values())).to(device), tau))
    return 0


def _progress(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console)


def _play(title: str, game: PreferenceGame, steps: int, progress: Progress) -> dict[str, dict[int, float]]:
    """Exploitability, averaged over the games, along the way of every algorithm."""
    marks = sorted({max(1, round(steps ** (i / (REPORTS - 1)))) for i in range(REPORTS)})
    start = torch.linspace(0, 2, game.actions).to(game.preference).expand(game.log_reference.shape)
    curves = {}
    for name, (algorithm, options) in CONTENDERS.items():
        task = progress.add_task(f"{title}: {name}", total=steps)
        report = partial(_report, progress, task)
        solution = solve(game, algorithm, marks=marks, start=start, on_mark=report, **options)
        gaps = exploitability(solution.trajectory, game).mean(-1)
        curves[name] = dict(zip(marks, gaps.clamp(min=0).tolist(), strict=True))  # rounding may leave -1e-17
    return curves


def _report(progress: Progress, task: TaskID, mark: int) -> None:
    progress.update(task, completed=mark)


def _curve_table(title: str, curves: dict[str, dict[int, float]]) -> Table:
    table = Table(title=f"Exploitability after t steps: {title}", title_justify="left")
    table.add_column("t", justify="right")
    for name in curves:
        table.add_column(name, justify="right")
    for mark in next(iter(curves.values())):
        table.add_row(str(mark), *(f"{curve[mark]:.2e}" for curve in curves.values()))
    return table


def _figure_line(curves: dict[str, dict[str, dict[int, float]]], tau: float, folder: Path) -> str:
    try:
        figure = plots.new_figure(5.5 * len(curves), 4)
    except ImportError as error:
        return f"No figure: {error}"
    for axes, (title, suite) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        ways = {name: (list(curve), list(curve.values())) for name, curve in suite.items()}
        plots.plot_curves(axes, ways, f"exploitability (tau = {tau:g})")
        axes.set_title(title)
    path = folder / "exploitability.png"
    plots.save(figure, path)
    return f"Figure: {path}"


def _median_seconds(function: Callable[[], torch.Tensor], repeats: int) -> float:
    def once() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()
    return statistics.median(once() for _ in range(repeats))


def _speed_line(preference: torch.Tensor, tau: float, iterations: int = 50) -> str:
    """The same launch through `auto` and through the PyTorch reference, float32, alternating in this process."""
    preference = preference.float()
    log_reference = torch.zeros_like(preference[:, 0]).log_softmax(-1)
    args = log_reference, preference, log_reference
    options: dict[str, Any] = {"tau": tau, "step_sizes": torch.full((iterations,), 0.3, device=preference.device)}
    kernel = _median_seconds(lambda: mirror_descent(*args, **options), 5)
    baseline = _median_seconds(lambda: mirror_descent(*args, **options, backend="reference"), 5)
    chosen = explain("mirror_descent", *args, **options).chosen
    games, actions, _ = preference.shape
    return (
        f"{iterations} steps of {games} games x {actions} actions on {preference.device.type}: "
        f"{chosen} {kernel * 1e3:.1f} ms, PyTorch reference {baseline * 1e3:.1f} ms: "
        f"[bold]{baseline / kernel:.1f}x[/bold] ({torch.get_num_threads()} CPU threads)"
    )
