"""Figures of win rates, from numbers alone: the matrix, estimates against a quantity, win rate against KL.

All are WIDTH inches wide, so that at 400 pixels the smallest letters are 9 pixels high. Series differ by colour, marker
and line style, so that they can be distinguished in print and with every kind of colour vision.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.plots import MARKERS, PALETTE, STYLES, new_figure
from .frontier import FrontierPoint
from .intervals import Estimate

WIDTH = 4.2  # inches
SMALL, LARGE = 7, 8.5  # points; 400 pixels / (72 * 4.2 points) = 1.32 pixels per point
SPREAD = 0.4  # share of the least distance of two x over which the series of `plot_estimates` are spread
WITH_INTERVALS = 9  # policies of a matrix whose cells have room for their intervals
Cell = Mapping[str, Any] | Estimate | None


def plot_win_rates(labels: Sequence[str], matrix: Sequence[Sequence[Cell]], title: str = "") -> Any:
    """Plot win rates, row against column, as a matplotlib figure: blue above 1/2, red below, numbers in the cells.

    Args:
        labels (sequence of N texts): the policies.
        matrix (N rows of N cells): each an Estimate or its dict (`Tournament.matrix`), None on the diagonal.
        title (str): above the matrix.
    """
    cells = [[cell.to_dict() if isinstance(cell, Estimate) else cell for cell in row] for row in matrix]
    if len(cells) != len(labels) or any(len(row) != len(labels) for row in cells):
        shape = f"{len(cells)} rows of {sorted({len(row) for row in cells})} cells"
        raise ValueError(f"plot_win_rates: matrix: expected {len(labels)} rows of as many cells; got {shape}")
    figure = new_figure(WIDTH, 0.92 * WIDTH)
    axes = figure.subplots()
    rates = [[float("nan") if cell is None else cell["mean"] for cell in row] for row in cells]
    axes.imshow(rates, cmap="RdBu", vmin=0.0, vmax=1.0)
    for i, row in enumerate(cells):
        for j, cell in enumerate(row):
            if cell is not None:
                text = f"{cell['mean']:.2f}"
                if len(labels) <= WITH_INTERVALS:
                    text += f"\n±{cell['half']:.2f}"
                colour = "white" if abs(cell["mean"] - 0.5) > 0.3 else "black"
                axes.text(j, i, text, ha="center", va="center", fontsize=SMALL, color=colour, parse_math=False)
    axes.set_xticks(range(len(labels)), labels, rotation=40, ha="right", rotation_mode="anchor", fontsize=SMALL)
    axes.set_yticks(range(len(labels)), labels, fontsize=SMALL)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)  # a name may hold a $
    axes.set_title(title or "P(row preferred to column)", fontsize=LARGE, parse_math=False)
    return figure


def plot_estimates(
    series: Mapping[str, Sequence[tuple[float, Estimate]]],
    xlabel: str,
    ylabel: str,
    title: str = "",
    *,
    level: float | None = None,
) -> Any:
    """Plot estimates with their intervals against a quantity as a matplotlib figure, a line for each series.

    Series are moved apart sideways by less than half the least distance of two points, so that intervals at one x do
    not hide each other.

    Args:
        series (mapping label -> sequence of (x, Estimate)): the points, in any order.
        xlabel, ylabel (str): of the axes.
        title (str): above.
        level (float or None): where a horizontal line is drawn, such as 1/2 for win rates.
    """
    places = sorted({x for each in series.values() for x, _ in each})
    room = SPREAD * min((after - before for before, after in itertools.pairwise(places)), default=0.0)
    shifts = [room * (2 * number + 1 - len(series)) / (2 * max(1, len(series) - 1)) for number in range(len(series))]
    points = {label: [(x + shift, 0.0, y.mean, y.half) for x, y in sorted(each, key=lambda p: p[0])]
              for shift, (label, each) in zip(shifts, series.items(), strict=True)}  # fmt: skip
    return _plot(points, xlabel, ylabel, title, level)


def plot_frontiers(
    frontiers: Mapping[str, Sequence[FrontierPoint]],
    opponent: str = "the reference",
    title: str = "",
    *,
    at: float | None = None,
) -> Any:
    """Plot win rate against KL as a matplotlib figure, a line for each method, with the intervals of both.

    Args:
        frontiers (mapping label -> sequence of FrontierPoint): of `Frontier.points`.
        opponent (str): name of the opponent of the win rates.
        title (str): above.
        at (float or None): where a vertical line is drawn, such as the KL of a comparison.
    """
    points = {
        label: [(point.kl.mean, point.kl.half, point.rate.mean, point.rate.half)
                for point in sorted(each, key=lambda point: point.kl.mean)]
        for label, each in frontiers.items()
    }  # fmt: skip
    xlabel, ylabel = "KL(policy, reference), nats per answer", f"win rate against {opponent}"
    figure = _plot(points, xlabel, ylabel, title, 0.5)
    if at is not None:
        figure.axes[0].axvline(at, color="0.5", linewidth=1, linestyle=":", zorder=0)
    return figure


def _plot(
    series: Mapping[str, Sequence[tuple[float, float, float, float]]],  # label -> (x, its half, y, its half)
    xlabel: str,
    ylabel: str,
    title: str,
    level: float | None,
) -> Any:
    figure = new_figure(WIDTH, 0.8 * WIDTH)
    axes = figure.subplots()
    if level is not None:
        axes.axhline(level, color="0.5", linewidth=1, zorder=0)
    for index, (label, points) in enumerate(series.items()):
        x, x_half, y, y_half = zip(*points, strict=True) if points else ((), (), (), ())
        axes.errorbar(
            x, y, y_half, x_half if any(x_half) else None, label=label, capsize=2, linewidth=1.3, markersize=4,
            color=PALETTE[index % len(PALETTE)], marker=MARKERS[index % len(MARKERS)],
            linestyle=STYLES[(index + index // len(PALETTE)) % len(STYLES)], elinewidth=0.9,
        )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=SMALL)
    axes.set_xlabel(xlabel, fontsize=LARGE)
    axes.set_ylabel(ylabel, fontsize=LARGE)
    axes.set_title(title, fontsize=LARGE)
    if series:
        columns = legend_columns(list(series))
        legend = figure.legend(loc="outside lower center", ncols=columns, fontsize=SMALL, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def legend_columns(labels: Sequence[str]) -> int:
    """Return the most columns, at most 3, in which a legend of these labels is not wider than the figure.

    Args:
        labels (sequence of str): one or more, filled in column by column.
    """
    em = SMALL  # points; a letter takes 0.57 of it, a sample of a line and its gap 2.8, the gap between columns 2
    for columns in range(min(3, len(labels)), 1, -1):
        rows, longer = divmod(len(labels), columns)
        ends = list(itertools.accumulate(rows + (column < longer) for column in range(columns)))
        letters = sum(max(map(len, labels[start:end])) for start, end in itertools.pairwise([0, *ends]))
        if em * (0.57 * letters + 2.8 * columns + 2 * (columns - 1)) <= 72 * WIDTH:
            return columns
    return 1
