"""Plots of result files: speed-up over eager, percent of the floor, growth; one figure per case and device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .growth import growth_figure
from .report import three_digits
from .results import ResultRow, latest

# Okabe and Ito's palette, safe for colour-blind readers. An implementation has the same colour in every figure.
COLOURS = {
    "eager": "#999999",
    "torch.compile": "#E69F00",
    "torch": "#56B4E9",
    "triton": "#CC79A7",
    "cuda": "#009E73",
    "cpu": "#0072B2",
}
OTHERS = ("#D55E00", "#F0E442", "#000000")
BAR = 0.8  # of a row's height


def _colour(name: str, names: Sequence[str]) -> str:
    extra = [other for other in names if other not in COLOURS]
    return COLOURS[name] if name in COLOURS else OTHERS[extra.index(name) % len(OTHERS)]


def _group(row: ResultRow) -> str:
    shape = row.key.shape.replace(" ", ", ")
    return f"{shape}\n{row.key.dtype}, {row.key.mode}"


def _speedup(row: ResultRow) -> float | None:
    return row.speedup.eager if row.speedup is not None and row.key.implementation != "eager" else None


def _percent(row: ResultRow) -> float | None:
    return row.floor.percent if row.floor is not None else None


@dataclass(frozen=True)
class _Kind:
    """One kind of figure."""

    value: Callable[[ResultRow], float | None]
    unit: str
    axis_label: str
    baseline: float
    baseline_label: str
    may_be_logarithmic: bool  # a logarithmic axis has no zero: its bars start at the baseline


KINDS = {
    "speedup": _Kind(_speedup, "x", "speed-up against PyTorch eager (times as fast)", 1.0, "eager", True),
    "floor": _Kind(_percent, " %", "percent of the floor reached (higher is better)", 100.0, "floor", False),
}


def _bar(axes: Any, position: float, number: float, kind: _Kind, start: float, **style: Any) -> None:
    axes.barh(position, number - start, left=start, height=BAR, edgecolor="white", **style)
    leftwards = number < start
    axes.annotate(
        f"{three_digits(number)}{kind.unit}",
        (number, position),
        (-4 if leftwards else 4, 0),
        textcoords="offset points",
        ha="right" if leftwards else "left",
        va="center",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},  # covers the lines behind a number
    )


def _bars(axes: Any, rows: Sequence[ResultRow], kind: _Kind, start: float) -> None:
    """Draw one group of horizontal bars for each shape and mode, with the value at each bar's end."""
    groups: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        number = kind.value(row)
        if number is not None:
            groups.setdefault(_group(row), []).append((row.key.implementation, number))
    names = list(dict.fromkeys(name for bars in groups.values() for name, _ in bars))
    labelled: set[str] = set()
    top = 0.0
    ticks = []
    for label, bars in groups.items():
        for index, (name, number) in enumerate(bars):
            legend = None if name in labelled else name
            _bar(axes, top + index, number, kind, start, color=_colour(name, names), label=legend)
            labelled.add(name)
        ticks.append((top + (len(bars) - 1) / 2, label))
        top += len(bars) + 0.8
    axes.set_yticks([position for position, _ in ticks], [label for _, label in ticks])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)


def _scale(axes: Any, lowest: float, highest: float, logarithmic: bool) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    if not logarithmic:
        axes.set_xlim(0, highest * 1.12)
        return
    room = (highest / lowest) ** 0.12  # for the numbers at the bars' ends
    axes.set_xscale("log")
    axes.set_xlim(lowest / room, highest * room)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")


def _figure(rows: Sequence[ResultRow], kind: _Kind) -> Any | None:
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    measured_rows = [row for row in rows if kind.value(row) is not None]
    values = [number for row in measured_rows if (number := kind.value(row)) is not None]
    if not values:
        return None
    lowest, highest = min([*values, kind.baseline]), max([*values, kind.baseline])
    logarithmic = kind.may_be_logarithmic and highest > 20 * lowest
    groups = {_group(row) for row in measured_rows}
    figure = Figure(figsize=(9.5, 1.4 + 0.3 * (len(measured_rows) + 0.8 * len(groups))), layout="constrained")
    axes = figure.add_subplot()
    _bars(axes, measured_rows, kind, kind.baseline if logarithmic else 0.0)
    _scale(axes, lowest, highest, logarithmic)
    axes.axvline(kind.baseline, color="#333333", linewidth=1.2, linestyle="--", label=kind.baseline_label)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    axes.set_xlabel(kind.axis_label)
    axes.set_title(f"{rows[0].key.case}\n{_where(rows[0])}", loc="left", fontsize=11)
    return figure


def write_plots(rows: Sequence[ResultRow], folder: Path) -> list[Path]:
    """Write a PNG and an SVG for every case, device and thread count in `rows`; the latest row of a key counts.

    Rows of the preset growth are drawn as lines over one size each, all others as bars.
    """
    folder.mkdir(parents=True, exist_ok=True)
    growing = [row for row in rows if row.run.preset == "growth"]
    paths = []
    for suffix, block in _blocks([row for row in rows if row.run.preset != "growth"]).items():
        for name, kind in KINDS.items():
            paths += _save(_figure(block, kind), folder / f"{name}_{suffix}")
    for suffix, block in _blocks(growing).items():
        colours = {row.key.implementation: "" for row in block}
        colours = {name: _colour(name, list(colours)) for name in colours}
        paths += _save(growth_figure(block, colours, _where(block[0])), folder / f"growth_{suffix}")
    return paths


def _blocks(rows: Sequence[ResultRow]) -> dict[str, list[ResultRow]]:
    """Group rows by case, device and thread count: return the end of a figure's file name -> its rows."""
    blocks: dict[str, list[ResultRow]] = {}
    for key, row in latest(rows).items():
        place = f"{key.device}{key.threads}" if key.device == "cpu" else key.device
        blocks.setdefault(f"{key.case}_{place}", []).append(row)
    return blocks


def _where(row: ResultRow) -> str:
    """Return the second line of the title."""
    key, machine = row.key, row.run.machine
    plural = "s" if key.threads > 1 else ""
    return str(machine["gpu"]) if key.device == "cuda" else f"{machine['cpu']}, {key.threads} thread{plural}"


def _save(figure: Any | None, stem: Path) -> list[Path]:
    if figure is None:
        return []
    paths = [stem.with_name(f"{stem.name}.{extension}") for extension in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths
