"""The figure of the preset growth: time and peak memory over one size at a time, one line per implementation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .results import ResultRow

LEAST_POINTS = 3  # of a sweep
PANELS = {"time (ms)": 0, "peak memory beyond the inputs (MiB)": 1}


def sweeps(rows: Sequence[ResultRow]) -> dict[str, list[ResultRow]]:
    """ "tokens, at length=512 ..." -> the rows that differ in that size alone."""
    blocks: dict[str, list[ResultRow]] = {}
    for row in rows:
        sizes = _sizes(row)
        for name, value in sizes.items():
            if value.isdigit() and row.timing is not None:
                others = " ".join(f"{other}={sizes[other]}" for other in sizes if other != name)
                blocks.setdefault(f"{name}, at {others} {row.key.dtype}, {row.key.mode}", []).append(row)
    return {
        label: block
        for label, block in blocks.items()
        if len({_sizes(row)[label.partition(",")[0]] for row in block}) >= LEAST_POINTS
    }


def _sizes(row: ResultRow) -> dict[str, str]:
    return dict(part.split("=", 1) for part in row.key.shape.split())


def _measures(row: ResultRow) -> tuple[float | None, float | None]:
    milliseconds = row.timing.median_us / 1e3 if row.timing is not None else None
    return milliseconds, row.memory.peak_bytes / 2**20 if row.memory is not None else None


def _lines(axes: Any, panel: int, size: str, rows: Sequence[ResultRow], colours: Mapping[str, str]) -> None:
    for name, colour in colours.items():
        values = [(int(_sizes(row)[size]), _measures(row)[panel]) for row in rows if row.key.implementation == name]
        points = sorted((at, value) for at, value in values if value)  # zero has no logarithm
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def growth_figure(rows: Sequence[ResultRow], colours: Mapping[str, str], where: str) -> Any | None:
    """Draw a row of two panels for each size that was varied; return None if none was."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    blocks = sweeps(rows)
    if not blocks:
        return None
    figure = Figure(figsize=(10.5, 0.9 + 3.4 * len(blocks)), layout="constrained")
    grid = figure.subplots(len(blocks), len(PANELS), squeeze=False)
    for (label, block), pair in zip(blocks.items(), grid, strict=True):
        size, _, rest = label.partition(", at ")
        for (title, panel), axes in zip(PANELS.items(), pair, strict=True):
            _lines(axes, panel, size, block, colours)
            axes.set_xlabel(size)
            axes.set_ylabel(title)
        pair[0].set_title(rest, loc="left", fontsize=9)
    entries = {label: line for axes in grid.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside right upper", frameon=False)
    figure.suptitle(f"{rows[0].key.case}\n{where}", x=0.01, ha="left", fontsize=11)
    return figure
