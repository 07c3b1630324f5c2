"""Figures of solved games: convergence on logarithmic axes, and trajectories on the simplex where A = 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..core.plots import STYLES

FLOOR = 1e-16  # rounding error of a zero divergence in float64


def plot_curves(
    axes: Any,
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]],  # name -> marks, values
    ylabel: str,
    bound: tuple[Sequence[int], Sequence[float]] | None = None,
) -> None:
    """Plot a measure of every algorithm's policies against the number of steps, log-log."""
    for index, (name, (marks, values)) in enumerate(curves.items()):
        axes.loglog(marks, [max(value, FLOOR) for value in values], linestyle=STYLES[index % len(STYLES)], label=name)
    if bound is not None:
        axes.loglog(*bound, color="0.5", linewidth=1, label="the theorem's bound")
    axes.set(xlabel="step t", ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend()


def plot_simplex(
    axes: Any, paths: Mapping[str, torch.Tensor], star: torch.Tensor, names: Sequence[str]
) -> None:  # paths (S, 3)
    """Plot trajectories of policies over three actions, and the equilibrium."""
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]], dtype=torch.float64, device="cpu")
    edge = corners[[0, 1, 2, 0]]
    axes.plot(edge[:, 0], edge[:, 1], color="0.7", linewidth=1)
    for corner, name, (dx, dy) in zip(corners.tolist(), names, ((-0.03, -0.05), (0.03, -0.05), (0, 0.03)), strict=True):
        axes.text(corner[0] + dx, corner[1] + dy, name, ha="center", parse_math=False)  # a name may hold a $
    for index, (name, path) in enumerate(paths.items()):
        points = path.double().cpu() @ corners
        axes.plot(points[:, 0], points[:, 1], linestyle=STYLES[index % len(STYLES)], linewidth=1.2, label=name)
    at = (star.double().cpu() @ corners).tolist()
    axes.plot(*at, marker="*", color="black", markersize=12, linestyle="none", label="equilibrium")
    axes.set_aspect("equal")
    axes.axis("off")
    axes.legend(loc="upper right", fontsize="small")
