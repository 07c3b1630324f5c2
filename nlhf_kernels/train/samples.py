"""A few prompts with their answers as a table, to see what the numbers hide: on the terminal, and where numbers go."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text
from transformers import integrations

from ..core.terminal import cut_lines, new_console, printable
from ..core.text import markdown_table
from ..core.upstream import wandb_of
from .experience import Experience

_writers: Any = integrations  # untyped, and not all of its names are exported
WIDTH = 300  # characters of a text that are shown
NAME = "samples"


class Samples(NamedTuple):
    columns: tuple[str, ...]
    rows: list[list[str]]


def samples_of(experience: Experience, count: int, each: int = 1) -> Samples:
    """Of the first `count` prompts, the first of their `each` pairs."""
    sides = ("y", "y'")[: len(experience.answers)]
    value = "P(y > y')" if len(sides) == 2 else "reward"
    rows = [
        [
            *map(_shown, (experience.prompts[row], *(side[row] for side in experience.answers))),
            f"{float(experience.value[row]):.3f}",
        ]
        for row in range(0, experience.pairs, each)[:count]
    ]
    return Samples(("prompt", *sides, value), rows)


def show(samples: Samples, step: int, console: Any = None) -> None:
    """One under the other, as texts want the width of the terminal: two lines of a prompt, four of an answer."""
    console = new_console(stderr=True) if console is None else console
    label = max(map(len, samples.columns))
    console.print(f"samples of update {step}")
    for row in samples.rows:
        grid = Table.grid(padding=(0, 1))
        for name, cell in zip(samples.columns, row, strict=True):
            asked = name == samples.columns[0]
            grid.add_row(f"  {name}", Text(cut_lines(cell, console.width - label - 3, 2 if asked else 4, end=asked)))
        console.print(grid)
        console.print()


def report(samples: Samples, step: int, callbacks: Iterable[Any]) -> None:
    """To tensorboard and wandb, where transformers reports to them."""
    for callback in callbacks:
        if isinstance(callback, _writers.TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_text(NAME, markdown_table(samples.columns, samples.rows), step)
        if isinstance(callback, _writers.WandbCallback) and (wandb := wandb_of(callback)) is not None:
            table = wandb.Table(columns=list(samples.columns), data=samples.rows)
            wandb.log({NAME: table, "train/global_step": step})


def _shown(text: str) -> str:
    """A model may write escape sequences; the terminal must not obey them."""
    return printable(text if len(text) <= WIDTH else "..." + text[-WIDTH:])
