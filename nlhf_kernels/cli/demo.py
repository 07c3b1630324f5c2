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
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..core.checks import check_integer, check_number
from ..core.registry import explain
from ..ops import mirror_descent
from ..tabular import cyclic_game, exploitability, random_games

REPORTS = 12  # times each algorithm is measured on its way
CONSTANT_STEP = 1.0  # converges on random games, circles for ever on rock-paper-scissors


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
            curves[title] = _play(title, preference.to(device), tau, arguments.steps, progress)
    for title, curve in curves.items():
        console.print(_curve_table(title, curve))
    console.print(_figure_line(curves, tau, arguments.out))
    console.print(_speed_line(next(iter(suites.values())).to(device), tau))
    return 0


def _progress(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console)


def _schedules(steps: int, tau: float, like: torch.Tensor) -> dict[str, tuple[torch.Tensor, str]]:
    """Algorithm -> its step sizes and whom it plays."""
    decreasing = 2 / (tau * (torch.arange(steps, dtype=like.dtype, device=like.device) + 2))
    constant = torch.full_like(decreasing, CONSTANT_STEP)
    return {
        "Nash-MD, steps 2/(tau(t+2))": (decreasing, "mixture"),
        f"Nash-MD, step {CONSTANT_STEP:g}": (constant, "mixture"),
        f"self-play, step {CONSTANT_STEP:g}": (constant, "policy"),
    }


def _play(
    title: str, preference: torch.Tensor, tau: float, steps: int, progress: Progress
) -> dict[str, dict[int, float]]:
    """Exploitability, averaged over the games, along the way of every algorithm."""
    games, actions, _ = preference.shape
    ramp = torch.linspace(0, 2, actions, dtype=preference.dtype, device=preference.device).expand(games, -1)
    log_reference, start = (-ramp).log_softmax(-1), ramp.log_softmax(-1)  # a reference that prefers the first actions
    marks = sorted({max(1, round(steps ** (i / (REPORTS - 1)))) for i in range(REPORTS)})
    curves = {}
    for name, (step_sizes, opponent) in _schedules(steps, tau, preference).items():
        task = progress.add_task(f"{title}: {name}", total=steps)
        log_policy, done, curve = start, 0, {}
        for mark in marks:
            log_policy = mirror_descent(
                log_policy, preference, log_reference, tau=tau, step_sizes=step_sizes[done:mark], opponent=opponent
            )
            gap = exploitability(log_policy, preference, log_reference, tau)
            curve[mark] = max(0.0, gap.mean().item())  # rounding may leave -1e-17
            progress.update(task, completed=mark)
            done = mark
        curves[name] = curve
    return curves


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
        from matplotlib.figure import Figure
    except ImportError:
        return "No figure: matplotlib is not installed (pip install matplotlib)."
    figure = Figure(figsize=(5.5 * len(curves), 4), layout="constrained")
    for axes, (title, suite) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for (name, curve), style in zip(suite.items(), ("-", "--", ":"), strict=True):
            axes.loglog(list(curve), [max(value, 1e-16) for value in curve.values()], style, label=name, linewidth=2)
        axes.set(title=title, xlabel="step t", ylabel=f"exploitability (tau = {tau:g})")
        axes.grid(alpha=0.3)
        axes.legend()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "exploitability.png"
    figure.savefig(path, dpi=150)
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
