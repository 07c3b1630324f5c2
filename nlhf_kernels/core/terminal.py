"""The terminal: consoles that print texts as they are, and progress bars that fit 80 columns.

Names and texts come from users and models. Rich would read "[red]" or ":smile:" in them as its own markup, so every
console and every bar of the package is made here, with that switched off.
"""

from __future__ import annotations

from typing import Any


def new_console(*, stderr: bool = False, **options: Any) -> Any:
    """A rich Console without markup, emoji names and highlighting; `options` go to it."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, **options)


def new_progress(console: Any, *, transient: bool = True) -> Any:
    """A rich Progress: description, bar, count, time so far and time left, within 80 columns.

    transient   the bars are gone when all is done; False leaves them on the screen
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    cut = Column(max_width=34, no_wrap=True, overflow="ellipsis")
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=cut),
        BarColumn(bar_width=14),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=transient,
        disable=not console.is_terminal,  # a file would get an empty line
    )


def printable(text: str) -> str:
    """The text with control characters written out: a model may emit escape sequences that would drive a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
