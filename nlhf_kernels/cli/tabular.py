"""`nlhf-kernels tabular`: solve a preference game and show which algorithms converge.

Prints each algorithm's final distance from the regularised Nash equilibrium, and plots its convergence. The game is
built in, or a preference matrix from a CSV, JSON or npy file.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.table import Table

from .. import tabular
from ..core.plots import FORMATS, check_path, new_figure, save
from ..core.terminal import new_console, new_progress
from ..tabular.files import read_preference
from ..tabular.plots import plot_curves, plot_simplex

GAMES = {
    "dice": lambda seed: tabular.dice_game()[0],
    "cyclic": lambda seed: tabular.cyclic_game()[0],
    "diversity": lambda seed: tabular.diversity_game(0.1)[0],
    "random": lambda seed: tabular.random_games(1, 10, seed=seed)[0],
}
DEFAULT_ALGORITHMS = "nash-md,nash-mp,omd@2,ema"  # on the default game two converge and two cycle
CONVERGED = 1e-6  # KL from the equilibrium below which a policy counts as converged
MARKS = 200  # policies recorded at steps evenly spaced on a logarithmic axis
FIRST = 200  # steps at the start that are all recorded, for a smooth trajectory on the simplex


class Outcome(NamedTuple):
    solution: tabular.Solution
    kl: list[float]
    exploitability: list[float]
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--game", choices=GAMES, default="cyclic", metavar="NAME", help=f"{', '.join(GAMES)} (default cyclic)"
    )
    source.add_argument("--file", type=Path, help="preference matrix: .csv, .json or .npy, P[a][b] = P(a > b)")
    parser.add_argument("--reference", help="comma-separated probabilities (default uniform)")
    parser.add_argument("--start", help="comma-separated probabilities to start from (default: leaning to the first)")
    parser.add_argument(
        "--algorithms",
        default=DEFAULT_ALGORITHMS,
        help=f"of {', '.join(tabular.ALGORITHMS)}; NAME@STEP has steps of that size instead of its own "
        f"(default {DEFAULT_ALGORITHMS})",
    )
    parser.add_argument("--tau", type=float, default=0.05, help="strength of the pull to the reference (default 0.05)")
    parser.add_argument("--steps", type=int, default=10_000, help="steps of every algorithm (default 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the random game")
    parser.add_argument("--plot", type=Path, help=f"write a figure here ({', '.join(FORMATS)})")
    parser.add_argument("--json", action="store_true", help="print the result as JSON and nothing else")


def run(arguments: argparse.Namespace) -> int:
    console = new_console(stderr=arguments.json)
    if arguments.plot:
        check_path("tabular", arguments.plot)
    game, names = _game(arguments)
    algorithms = _algorithms(arguments.algorithms)
    star = tabular.equilibrium(game)
    outcomes = _solve(game, star, algorithms, arguments)
    if arguments.json:
        print(json.dumps(_as_json(names, star, outcomes), indent=2))
    else:
        _print(console, names, star, outcomes)
    if arguments.plot:
        _draw(game, names, star, outcomes, arguments.plot)
        console.print(f"Figure: {arguments.plot}", soft_wrap=True)
    return 0


def _game(arguments: argparse.Namespace) -> tuple[tabular.PreferenceGame, list[str]]:
    if arguments.file is not None:
        preference, names = read_preference(arguments.file)
    else:
        preference = GAMES[arguments.game](arguments.seed)
        names = [str(action) for action in range(len(preference))]
    reference = _probabilities("--reference", arguments.reference, len(names))
    return tabular.PreferenceGame(preference, reference, tau=arguments.tau), names


def _probabilities(option: str, text: str | None, actions: int) -> torch.Tensor | None:
    if text is None:
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option}: expected numbers separated by commas; got {text!r}") from None
    if len(values) != actions or min(values) <= 0:
        raise ValueError(f"{option}: expected {actions} probabilities above 0; got {text!r}")
    return torch.tensor(values, dtype=torch.float64, device="cpu") / sum(values)


def _algorithms(text: str) -> dict[str, tuple[str, dict[str, float]]]:
    """Map each entry of --algorithms to the algorithm and its options."""
    algorithms: dict[str, tuple[str, dict[str, float]]] = {}
    for entry in (part.strip() for part in text.split(",") if part.strip()):
        name, at, size = entry.partition("@")
        if name not in tabular.ALGORITHMS or (at and (name == "nash-mp" or not _is_step(size))):
            raise ValueError(
                f"--algorithms: expected some of {', '.join(tabular.ALGORITHMS)}, each as NAME or (but for nash-mp) "
                f"NAME@STEP, omd@2 say; got {entry!r}"
            )
        algorithms[entry] = name, {"step": float(size)} if at else {}
    if not algorithms:
        raise ValueError(f"--algorithms: expected some of {', '.join(tabular.ALGORITHMS)}; got {text!r}")
    return algorithms


def _is_step(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def _solve(
    game: tabular.PreferenceGame,
    star: torch.Tensor,
    algorithms: dict[str, tuple[str, dict[str, float]]],
    arguments: argparse.Namespace,
) -> dict[str, Outcome]:
    steps = arguments.steps
    if steps < 1:
        raise ValueError(f"--steps: expected at least 1; got {steps}")
    marks = sorted(
        {max(1, round(steps ** (i / (MARKS - 1)))) for i in range(MARKS)} | {*range(1, min(steps, FIRST) + 1)}
    )
    start = _probabilities("--start", arguments.start, game.actions)
    if start is None:
        start = torch.linspace(2, 0, game.actions, dtype=torch.float64, device="cpu").softmax(-1)
    outcomes = {}
    with new_progress(new_console(stderr=True)) as progress:
        for entry, (name, options) in algorithms.items():
            task = progress.add_task(entry, total=steps)
            began = time.perf_counter()
            on_mark = partial(_advance, progress, task)
            settings: dict[str, Any] = {"marks": marks, "start": start.log(), "on_mark": on_mark, **options}
            solution = tabular.solve(game, name, **settings)
            seconds = time.perf_counter() - began
            kl = tabular.kl_divergence(star.expand_as(solution.trajectory), solution.trajectory)
            gap = tabular.exploitability(solution.trajectory, game)
            outcomes[entry] = Outcome(solution, kl.clamp(min=0).tolist(), gap.clamp(min=0).tolist(), seconds)
    return outcomes


def _advance(progress: Any, task: int, mark: int) -> None:
    progress.update(task, completed=mark)


def _print(console: Any, names: list[str], star: torch.Tensor, outcomes: dict[str, Outcome]) -> None:
    console.print(f"Equilibrium: {_policy(names, star)}")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in ("algorithm", "KL", "exploitability", "seconds"):
        table.add_column(column, justify="left" if column == "algorithm" else "right", no_wrap=True)
    table.add_column("last policy", overflow="fold")
    for entry, outcome in outcomes.items():
        figures = f"{outcome.kl[-1]:.1e}", f"{outcome.exploitability[-1]:.1e}", f"{outcome.seconds:.2f}"
        table.add_row(entry, *figures, _policy(names, outcome.solution.log_policy))
    console.print(table)
    steps = next(iter(outcomes.values())).solution.marks[-1]
    console.print(f"KL from the equilibrium to the last policy, after {steps} steps.")
    converged = [entry for entry, outcome in outcomes.items() if outcome.kl[-1] < CONVERGED]
    for verdict, entries in (
        (f"At the equilibrium (KL below {CONVERGED:g})", converged),
        ("Not there", [entry for entry in outcomes if entry not in converged]),
    ):
        if entries:
            console.print(f"{verdict}: {', '.join(entries)}")


def _policy(names: list[str], log_policy: torch.Tensor) -> str:
    """Format the probabilities of all actions, or of the likeliest five where there are more."""
    probabilities = list(zip(log_policy.exp().tolist(), names, strict=True))
    shown = probabilities if len(names) <= 5 else sorted(probabilities, reverse=True)[:5]
    return "  ".join(f"{name} {probability:.3f}" for probability, name in shown) + (" ..." if len(names) > 5 else "")


def _as_json(names: list[str], star: torch.Tensor, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    return {
        "actions": names,
        "equilibrium": star.exp().tolist(),
        "algorithms": {
            name: {
                "policy": outcome.solution.log_policy.exp().tolist(),
                "steps": list(outcome.solution.marks),
                "kl": outcome.kl,
                "exploitability": outcome.exploitability,
                "seconds": outcome.seconds,
            }
            for name, outcome in outcomes.items()
        },
    }


def _draw(
    game: tabular.PreferenceGame, names: list[str], star: torch.Tensor, outcomes: dict[str, Outcome], path: Path
) -> None:
    on_simplex = game.actions == 3
    figure = new_figure(11 if on_simplex else 6, 4.5)
    axes = figure.subplots(1, 2 if on_simplex else 1, squeeze=False)[0]
    marks = next(iter(outcomes.values())).solution.marks
    bound = marks, [8 / (game.tau**2 * (mark + 1)) for mark in marks]
    curves = {name: (outcome.solution.marks, outcome.kl) for name, outcome in outcomes.items()}
    plot_curves(axes[0], curves, "KL(equilibrium, policy)", bound if "nash-md" in outcomes else None)
    if on_simplex:
        paths = {name: outcome.solution.trajectory[:FIRST].exp() for name, outcome in outcomes.items()}
        plot_simplex(axes[1], paths, star.exp(), names)
    save(figure, path)
