"""The terminal: consoles that print texts as they are, and progress bars that fit 80 columns.

Names and texts come from users and models. Rich would read "[red]" or ":smile:" in them as its own markup, so every
console and every bar of the package is made here, with that switched off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a dependency that importing the library does not load
    from rich.console import Console
    from rich.progress import Progress


def new_console(*, stderr: bool = False, **options: Any) -> Console:
    """A rich Console without markup, emoji names and highlighting; `options` go to it."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, **options)


def new_progress(console: Console, *, transient: bool = True) -> Progress:
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

    cut = Column(max_width=30, no_wrap=True, overflow="ellipsis")
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=cut),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=transient,
        disable=not console.is_terminal,  # a file would get an empty line
    )


def cut_lines(text: str, width: int, count: int, *, end: bool = False) -> str:
    """At most `count` lines of `width` columns: the first of them, or with `end` the last; dots where text is gone."""
    lines = [line[start : start + width] for line in text.split("\n") for start in range(0, max(len(line), 1), width)]
    if len(lines) <= count:
        return text
    if end:
        return "\n".join(["..." + lines[-count][3:], *lines[len(lines) - count + 1 :]])
    return "\n".join([*lines[: count - 1], lines[count - 1][: width - 3] + "..."])


def printable(text: str) -> str:
    """The text with control characters written out: a model may emit escape sequences that would drive a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
