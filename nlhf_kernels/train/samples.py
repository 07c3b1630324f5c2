"""A few prompts with their answers as a table, on the terminal and wherever metrics are reported."""

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
    """Return the first pair of the first `count` prompts, where every prompt has `each` pairs."""
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
    """Print each pair below the other, two lines of a prompt and four of an answer, to use the terminal's width."""
    console = new_console(stderr=True) if console is None else console
    label = max(map(len, samples.columns))
    console.print(f"samples of update {step}")
    for row in samples.rows:
        grid = Table.grid(padding=(0, 1))
        for name, cell in zip(samples.columns, row, strict=True):
            is_prompt = name == samples.columns[0]
            grid.add_row(
                f"  {name}", Text(cut_lines(cell, console.width - label - 3, 2 if is_prompt else 4, end=is_prompt))
            )
        console.print(grid)
        console.print()


def report(samples: Samples, step: int, callbacks: Iterable[Any]) -> None:
    """Send the table to tensorboard and wandb where transformers reports to them."""
    for callback in callbacks:
        if isinstance(callback, _writers.TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_text(NAME, markdown_table(samples.columns, samples.rows), step)
        if isinstance(callback, _writers.WandbCallback) and (wandb := wandb_of(callback)) is not None:
            table = wandb.Table(columns=list(samples.columns), data=samples.rows)
            wandb.log({NAME: table, "train/global_step": step})


def _shown(text: str) -> str:
    """Return the text's end without escape sequences, which a model may generate and a terminal would execute."""
    return printable(text if len(text) <= WIDTH else "..." + text[-WIDTH:])
