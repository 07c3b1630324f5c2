"""Implementations in processes of their own, each with what a benchmark learns of it: one row of results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .case import Shape
from .memory import METHODS
from .processes import Remote, RemoteError
from .results import Accuracy, Memory, ResultRow, RowKey, Speedup, finite_or_none
from .runner import RunContext
from .timing import Timing


@dataclass
class Entry:
    """An implementation. One that fails is asked nothing more, has no time, and costs no other entry its row.

    Args:
        name: of its row.
        process: with its object; None: it cannot run.
        ours: False: a rival, whose package may be absent.
        status, reasons, accuracy, timing: of its row.
        peak: bytes.
    """

    name: str
    process: Remote | None
    ours: bool
    status: str = "ok"
    reasons: tuple[str, ...] = ()
    accuracy: Accuracy | None = None
    timing: Timing | None = None
    peak: int | None = None

    def wait(self, seconds: float | None = None) -> None:
        """Wait until its object exists, at most `seconds`."""
        self._try(lambda process: process.wait(seconds))

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of its object; None if the entry has failed, now or earlier."""
        return self._try(lambda process: process.call(method, *arguments))

    def _try(self, question: Callable[[Remote], Any]) -> Any:
        if self.status != "ok" or self.process is None:
            return None
        try:
            return question(self.process)
        except RemoteError as error:
            self.fail(str(error), "unavailable" if "ImportError" in error.kinds and not self.ours else "failed")
            return None

    def fail(self, reason: str, status: str = "failed") -> None:
        self.status, self.reasons, self.timing = status, (reason,), None

    def judge(self, error: float, allowed: float, reason: str) -> None:
        """Take the error of its results; fail with `reason` if that is not allowed."""
        self.accuracy = Accuracy(finite_or_none(error), allowed)
        if not error <= allowed:
            self.fail(reason, "red")

    def time(self, timing: Timing | Exception) -> None:
        """Take its time, or what prevented one."""
        if isinstance(timing, Exception):
            self.fail(str(timing))
        else:
            self.timing = timing

    def row(
        self,
        case: str,
        shape: Shape,
        context: RunContext,
        *,
        chosen: bool,
        rival: Timing | None,
        work: tuple[float, float] | None = None,
    ) -> ResultRow:
        """Make its row, with its speed-up over `rival` and the least time of `work`, in bytes and FLOPs."""
        device, timing = context.settings.device.type, self.timing
        ratio = rival.median_us / timing.median_us if timing is not None and rival is not None else None
        return ResultRow(
            key=RowKey(case, shape.label, shape.dtype, "full", self.name, device, context.threads),
            kind="backend" if self.ours else "baseline",
            status=self.status,
            run=context.facts,
            reasons=self.reasons,
            chosen=chosen,
            accuracy=self.accuracy,
            timing=timing,
            memory=Memory(self.peak, METHODS[device]) if timing is not None and self.peak is not None else None,
            floor=context.ceilings.floor_of(timing, *work, shape.dtype) if timing is not None and work else None,
            speedup=Speedup(ratio, None) if timing is not None else None,
        )
