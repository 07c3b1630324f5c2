"""Tables for the terminal, readable in 120 columns: results by case and shape, and the comparison of two files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .compare import Change
from .results import ResultRow, RunFacts

STATUS_STYLE = {"ok": "", "red": "bold red", "failed": "bold red"}
NOISY = 1.5
VERDICT_STYLE = {"same": "", "new": "cyan", "faster": "green", "drifted": "yellow"}


def _unit(microseconds: float) -> tuple[float, str]:
    return (1.0, "us") if microseconds < 1e3 else (1e3, "ms") if microseconds < 1e6 else (1e6, "s")


def three_digits(value: float) -> str:
    """Format without exponents: 1234 -> 1234, 123.4 -> 123, 12.3 -> 12.3, 0.0123 -> 0.012."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 1 else f"{value:.2g}"


def format_us(microseconds: float | None) -> str:
    if microseconds is None:
        return "-"
    scale, unit = _unit(microseconds)
    return f"{three_digits(microseconds / scale)} {unit}"


def format_range(low_us: float, high_us: float) -> str:
    scale, _ = _unit(low_us)
    return f"{three_digits(low_us / scale)} - {three_digits(high_us / scale)}"


def format_bytes(count: float | None) -> str:
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{three_digits(count)} {unit}" if count else "0"
        count /= 1024
    return f"{three_digits(count)} GiB"


def format_ratio(value: float | None) -> str:
    return "-" if value is None else f"{three_digits(value)}x"


def _cells(row: ResultRow) -> list[str]:
    name = f"  {row.key.implementation}{' (auto)' if row.chosen else ''}"
    error = "-" if row.accuracy is None else "inf" if row.accuracy.error is None else f"{row.accuracy.error:.0e}"
    if row.timing is None or row.speedup is None:
        return [name, row.status.upper(), "-", "-", "-", "-", "-", error]
    return [
        name,
        format_us(row.timing.median_us),
        format_range(row.timing.p20_us, row.timing.p80_us),
        format_ratio(row.speedup.eager),
        format_ratio(row.speedup.compiled),
        "-" if row.floor is None else f"{three_digits(row.floor.percent)} %",
        "-" if row.memory is None else format_bytes(row.memory.peak_bytes),
        error,
    ]


def results_table(case: str, rows: Sequence[ResultRow]) -> Table:
    """Make a case's table: a block for each shape and mode, a line for each implementation that is available."""
    table = Table(title=case, title_justify="left", title_style="bold", pad_edge=False, box=box.SIMPLE_HEAD)
    table.add_column("shape, mode / implementation", overflow="fold")
    for name in ("median", "p20 - p80", "eager", "compile", "floor", "peak", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for (shape, dtype, mode), block in groupby(rows, key=lambda row: (row.key.shape, row.key.dtype, row.key.mode)):
        table.add_section()
        table.add_row(f"[bold]{escape(shape)} {dtype}, {mode}[/bold]")
        for row in block:
            if row.status != "unavailable":
                table.add_row(*map(escape, _cells(row)), style=STATUS_STYLE[row.status])
    return table


def reason_lines(rows: Iterable[ResultRow]) -> list[str]:
    """Return every reason once, with the number of rows that have no time because of it."""
    counts: dict[tuple[str, str, str], int] = {}
    for row in rows:
        if row.status != "ok":
            key = (row.status, f"{row.key.case} {row.key.implementation}", "; ".join(row.reasons))
            counts[key] = counts.get(key, 0) + 1
    return [
        f"{status} ({count} row{'s' if count > 1 else ''}): {name}: {reason}"
        for (status, name, reason), count in counts.items()
    ]


def facts_line(facts: RunFacts, threads: int) -> str:
    rates = ", ".join(
        f"{dtype} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in facts.ceilings["matmul_flops_per_s"].items()
    )
    commit = (facts.commit or "none")[:10] + ("+changes" if facts.dirty else "")
    plural = "s" if threads > 1 else ""
    return (
        f"{facts.machine['gpu'] or facts.machine['cpu']}, {threads} CPU thread{plural}, "
        f"torch {facts.versions['torch']}, commit {commit}; "
        f"copy {facts.ceilings['copy_bytes_per_s'] / 1e9:.4g} GB/s, matmul {rates}"
    )


def print_results(rows: Sequence[ResultRow], console: Console) -> None:
    for case, block in groupby(rows, key=lambda row: row.key.case):
        console.print(results_table(case, list(block)))
    for line in reason_lines(rows):
        console.print(line, style="dim" if line.startswith("unavailable") else "bold red", markup=False)
    noisy = sum(row.timing is not None and row.timing.p80_us > NOISY * row.timing.p20_us for row in rows)
    if noisy:
        console.print(f"{noisy} rows are noisy (p80 > {NOISY} p20): was the machine busy?", style="yellow")
    if rows:
        console.print(facts_line(rows[0].run, rows[0].key.threads), style="dim", markup=False)


def print_comparison(changes: Sequence[Change], differences: Sequence[str], console: Console) -> None:
    table = Table(
        title="new against old", title_justify="left", title_style="bold", pad_edge=False, box=box.SIMPLE_HEAD
    )
    table.add_column("row", overflow="fold")
    for name in ("old", "new", "new / old", "verdict"):
        table.add_column(name, justify="right", no_wrap=True)
    for change in changes:
        detail = f"\n  {change.detail}" if change.detail else ""
        table.add_row(
            escape(f"{change.key}{detail}"),
            format_us(change.old_us),
            format_us(change.new_us),
            format_ratio(change.ratio),
            change.verdict,
            style=VERDICT_STYLE.get(change.verdict, "bold red"),
        )
    console.print(table)
    for difference in differences:
        console.print(f"measured under different conditions, times do not compare: {difference}", style="yellow")
