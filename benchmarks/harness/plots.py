"""Plots of result files: speed-up against eager and percent of the floor, one figure for each case and device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .results import ResultRow, latest

# Okabe and Ito's palette: told apart by colour-blind readers too. One colour an implementation, in every figure.
COLOURS = {
    "eager": "#999999",
    "torch.compile": "#E69F00",
    "reference": "#56B4E9",
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


def _bars(axes: Any, rows: Sequence[ResultRow], value: Callable[[ResultRow], float | None], suffix: str) -> None:
    """One group of horizontal bars for each shape and mode, the value written at each bar's end."""
    groups: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        number = value(row)
        if number is not None:
            groups.setdefault(_group(row), []).append((row.key.implementation, number))
    names = list(dict.fromkeys(name for bars in groups.values() for name, _ in bars))
    labelled: set[str] = set()
    top = 0.0
    ticks = []
    for label, bars in groups.items():
        for index, (name, number) in enumerate(bars):
            axes.barh(
                top + index,
                number,
                height=BAR,
                color=_colour(name, names),
                edgecolor="white",
                label=None if name in labelled else name,
            )
            axes.annotate(
                f"{number:.3g}{suffix}", (number, top + index), (3, 0), textcoords="offset points", va="center"
            )
            labelled.add(name)
        ticks.append((top + (len(bars) - 1) / 2, label))
        top += len(bars) + 0.8
    axes.set_yticks([position for position, _ in ticks], [label for _, label in ticks])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)


def _style(axes: Any, values: Sequence[float], reference: float, reference_label: str) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    lowest, highest = min([*values, reference]), max([*values, reference])
    if highest > 20 * lowest:
        axes.set_xscale("log")
        axes.set_xlim(lowest / 1.6, highest * 2.2)  # room for the numbers at the bars' ends
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    else:
        axes.set_xlim(0, highest * 1.12)
    axes.axvline(reference, color="#333333", linewidth=1.2, linestyle="--", label=reference_label)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)


def _figure(
    rows: Sequence[ResultRow],
    value: Callable[[ResultRow], float | None],
    texts: tuple[str, str, str],  # suffix of the numbers, label of the axis, label of the reference line
    reference: float,
) -> Any | None:
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    shown = [row for row in rows if value(row) is not None]
    if not shown:
        return None
    values = [number for row in shown if (number := value(row)) is not None]
    groups = {_group(row) for row in shown}
    suffix, axis_label, reference_label = texts
    figure = Figure(figsize=(9.5, 1.4 + 0.3 * (len(shown) + 0.8 * len(groups))), layout="constrained")
    axes = figure.add_subplot()
    _bars(axes, shown, value, suffix)
    _style(axes, values, reference, reference_label)
    key, machine = rows[0].key, rows[0].run.machine
    axes.set_xlabel(axis_label)
    where = machine["gpu"] if key.device == "cuda" else f"{machine['cpu']}, {key.threads} threads"
    axes.set_title(f"{key.case}\n{where}", loc="left", fontsize=11)
    return figure


def write_plots(rows: Sequence[ResultRow], folder: Path) -> list[Path]:
    """PNG and SVG of every case, device and thread count in `rows`; the latest row of a key counts."""
    folder.mkdir(parents=True, exist_ok=True)
    blocks: dict[tuple[str, str, int], list[ResultRow]] = {}
    for row in latest(rows).values():
        blocks.setdefault((row.key.case, row.key.device, row.key.threads), []).append(row)
    kinds = {
        "speedup": (_speedup, ("x", "speed-up against PyTorch eager (times as fast)", "eager"), 1.0),
        "floor": (_percent, (" %", "of the floor reached (percent, higher is better)", "floor"), 100.0),
    }
    written = []
    for (case, device, threads), block in blocks.items():
        suffix = f"{device}{threads}" if device == "cpu" else device
        for kind, (value, texts, reference) in kinds.items():
            figure = _figure(block, value, texts, reference)
            for extension in ("png", "svg") if figure is not None else ():
                path = folder / f"{kind}_{case}_{suffix}.{extension}"
                figure.savefig(path, dpi=150)
                written.append(path)
    return written
