"""A few prompts with their answers as a table, to see what the numbers hide."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .experience import Experience

WIDTH = 300  # characters of a text that are shown


def show(made: Experience, count: int, step: int, each: int = 1, console: Console | None = None) -> None:
    """Of the first `count` prompts, the first of their `each` pairs."""
    names = ("y", "y'")[: len(made.answers)]
    table = Table(title=f"update {step}", title_justify="left", show_lines=True)
    for name in ("prompt", *names):
        table.add_column(name, ratio=1)
    table.add_column("P(y > y')" if len(names) == 2 else "reward", justify="right")
    for row in range(0, made.pairs, each)[:count]:
        shown = [made.prompts[row], *(answers[row] for answers in made.answers)]
        table.add_row(*map(_cell, shown), f"{float(made.value[row]):.3f}")
    (console or Console(stderr=True)).print(table)


def _cell(text: str) -> Text:
    """A model may write escape sequences; the terminal must not obey them."""
    text = text if len(text) <= WIDTH else "..." + text[-WIDTH:]
    return Text("".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text))
