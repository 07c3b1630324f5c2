"""Which cache slots the rows of a decoding step read, told to code that a model's forward pass cannot tell.

A model of transformers hands its attention a query and the cache, and a mask where there is one; the rows' ranges are
known to whoever decodes. That one opens a `decode_window` around the forward passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock, get_ident
from typing import NamedTuple

import torch

from ...core.checks import INTEGERS, Sizes, check_tensor


class DecodeWindow(NamedTuple):
    """Row r attends to the positions [starts[r], ends[r]), its new token's position included."""

    starts: torch.Tensor | None  # (R,) int64; None: all rows start at 0
    ends: torch.Tensor  # (R,) int64


# Plain variables: torch.compile guards on the window, where it cannot trace a ContextVar and takes what a
# threading.local held for a constant. So one thread at a time has a window, and the others are not shown it.
_window: DecodeWindow | None = None
_owner = 0  # the thread that opened it
_turn = RLock()


def current_decode_window() -> DecodeWindow | None:
    """Of this thread. What is traced cannot ask who it is: it runs in the thread that holds the window."""
    mine = torch.compiler.is_compiling() or _owner == get_ident()
    return _window if mine else None


@contextmanager
def decode_window(starts: torch.Tensor | None, ends: torch.Tensor) -> Iterator[DecodeWindow]:
    """Within, decoding steps of models whose attention is "nlhf_decode" read these ranges, in this thread. Another
    thread that opens a window waits until this one is closed.

    Only the tensors are kept, their values are read by the kernels of each step: update them in place
    (`window.ends.add_(1)`), inside a captured graph too.
    """
    global _window, _owner
    sizes: Sizes = {}
    check_tensor("decode_window", "ends", ends, ("rows",), INTEGERS, sizes)
    if starts is not None:
        check_tensor("decode_window", "starts", starts, ("rows",), INTEGERS, sizes, ends.device)
    with _turn:
        before, _window, _owner = _window, DecodeWindow(starts, ends), get_ident()
        try:
            yield _window
        finally:
            _window = before
