"""The terminal: consoles that print texts as they are, and progress bars that fit 80 columns.

Names and texts come from users and models. Rich would read "[red]" or ":smile:" in them as its own markup, so every
console and every bar of the package is made here, with that switched off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importing the library does not import rich
    from rich.console import Console
    from rich.progress import Progress


def new_console(*, stderr: bool = False, **options: Any) -> Console:
    """Make a rich Console without markup, emoji names and highlighting; `options` go to it.

    A reader that closes the output raises BrokenPipeError, as with print(); rich 13.8 and later call sys.exit(1).
    """
    from rich.console import Console

    class PipedConsole(Console):
        def on_broken_pipe(self) -> None:
            raise  # the BrokenPipeError, which rich is handling when it calls this

    return PipedConsole(stderr=stderr, markup=False, emoji=False, highlight=False, **options)


def new_progress(console: Console, *, transient: bool = True) -> Progress:
    """Make a rich Progress: description, bar, count, time so far and time left, within 80 columns.

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


class Reporter:
    """Progress of long work: a line when a part begins, a bar while it runs.

    Args:
        console (rich Console or None): of `new_console`; None writes nothing.
    """

    def __init__(self, console: Console | None) -> None:
        self.console = console

    @property
    def shown(self) -> bool:
        return self.console is not None

    def say(self, text: str) -> None:
        """Print a line.

        Args:
            text (str): printed as it is.
        """
        if self.console is not None:
            self.console.print(text)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a progress bar; yields a function to call with the number of steps done so far.

        Args:
            title (str): before the bar.
            total (int): number of steps.
        """
        if self.console is None:
            yield lambda done: None
            return
        with new_progress(self.console) as progress:
            task = progress.add_task(f"  {title}", total=total)
            yield lambda done: progress.update(task, completed=done)


SILENT = Reporter(None)


def cut_lines(text: str, width: int, count: int, *, end: bool = False) -> str:
    """Return at most `count` lines of `width` columns: the first, or with `end` the last; dots mark omitted text."""
    lines = [line[start : start + width] for line in text.split("\n") for start in range(0, max(len(line), 1), width)]
    if len(lines) <= count:
        return text
    if end:
        return "\n".join(["..." + lines[-count][3:], *lines[len(lines) - count + 1 :]])
    return "\n".join([*lines[: count - 1], lines[count - 1][: width - 3] + "..."])


def printable(text: str) -> str:
    """Return the text with control characters written out: a model may emit sequences that would drive a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
