"""Handle SIGTERM, which schedulers send before SIGKILL: raise where work can be abandoned, record a request elsewhere.

A training run finishes or abandons its update, writes a checkpoint and raises `Stopped`, which ends a program with the
exit code 143, as the signal itself would.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOPPED = 128 + signal.SIGTERM
_requested = False
_deferred = 0  # blocks that the signal must not end


class Stopped(SystemExit):
    """SIGTERM ended work that is not finished."""

    def __init__(self) -> None:
        super().__init__(STOPPED)


@contextmanager
def stoppable() -> Iterator[None]:
    """Make SIGTERM raise `Stopped` in the block. An installed handler stays; other threads get none."""
    global _requested
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _requested = False


@contextmanager
def deferred() -> Iterator[None]:
    """Keep SIGTERM from ending the block, which polls `requested` where it can stop."""
    global _deferred
    _deferred += 1
    try:
        yield
    finally:
        _deferred -= 1


@contextmanager
def abandonable() -> Iterator[None]:
    """Let SIGTERM, before or during this part of a deferred block, end it with `Stopped`."""
    global _deferred
    before, _deferred = _deferred, 0
    try:
        stop_if_requested()
        yield
    finally:
        _deferred = before


def requested() -> bool:
    return _requested


def stop_if_requested() -> None:
    if _requested:
        raise Stopped


def _handle(*_: Any) -> None:
    global _requested
    _requested = True
    if not _deferred:
        raise Stopped
