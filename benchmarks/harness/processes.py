"""Objects in separate processes: a device-side assert or a lack of memory ends one process, not the others."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from operator import methodcaller
from typing import Any


class RemoteError(RuntimeError):
    """The exception that an object in another process raised, or how its process ended.

    Args:
        kinds: names of the exception's type and of its base classes; none if the process ended without a reply.
        reason: the message.
    """

    def __init__(self, kinds: Sequence[str], reason: str) -> None:
        super().__init__(reason)
        self.kinds = kinds


class Remote:
    """The object that `make(*arguments)` returns, in a new process. Both must be picklable.

    The constructor returns at once; `wait()` blocks until the object exists. Leaving a `with` block ends the process.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process ends the pipe

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the object exists, at most `seconds`; raise RemoteError if that fails."""
        if seconds is not None and not self._pipe.poll(max(seconds, 0.0)):
            raise RemoteError((), "not ready in time")
        self._answer()

    def call(self, method: str, *arguments: Any) -> Any:
        """Call the object's method and return its result. Raise RemoteError if it raises or if its process ends."""
        try:
            self._pipe.send((method, arguments))
        except OSError:
            raise self._ended() from None
        return self._answer()

    def _answer(self) -> Any:
        try:
            kinds, value = self._pipe.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if kinds:
            raise RemoteError(kinds, value)
        return value

    def _ended(self) -> RemoteError:
        self._process.join()
        code = self._process.exitcode or 0
        return RemoteError((), f"its process ended with {signal.Signals(-code).name if code < 0 else f'code {code}'}")

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Make the object in the new process, then answer calls with ((), value) or (exception's types, reason)."""

    def answer(function: Callable[[], Any]) -> None:
        try:
            reply: tuple[Sequence[str], Any] = (), function()
        except Exception as error:
            from .gate import short_reason  # imports PyTorch, so not at the top: objects without it start at once

            reply = [kind.__name__ for kind in type(error).__mro__], short_reason(error)
        pipe.send(reply)

    target: list[Any] = []  # the object; empty if making it failed
    answer(lambda: target.append(make(*arguments)))
    while target:
        try:
            method, method_arguments = pipe.recv()
        except EOFError:
            return
        answer(partial(methodcaller(method, *method_arguments), target[0]))
