"""What the user sees while the experiment runs: a line when a stage begins, a bar while it works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..core.terminal import new_progress


class Reporter:
    """Writes to a console of `core.terminal`; None as the console: writes nothing."""

    def __init__(self, console: Any | None) -> None:
        self.console = console

    @property
    def shown(self) -> bool:
        return self.console is not None

    def say(self, text: str) -> None:
        if self.console is not None:
            self.console.print(text)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """Yields what is told how much is done."""
        if self.console is None:
            yield lambda done: None
            return
        with new_progress(self.console) as progress:
            task = progress.add_task(f"  {title}", total=total)
            yield lambda done: progress.update(task, completed=done)


SILENT = Reporter(None)
