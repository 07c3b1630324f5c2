"""The range of cache slots that each row of a decoding step reads, beside a model's forward pass.

A model of transformers passes its attention function a query, the cache, and a mask if there is one, but no ranges.
Decoding code opens a `decode_window` around the forward passes, and the attention function reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock, get_ident
from typing import NamedTuple

import torch

from ...core.checks import INTEGERS, Sizes, check_tensor


class DecodeWindow(NamedTuple):
    """Row r attends to the positions [starts[r], ends[r]), its new token's position included.

    Args:
        starts ((R,) int64): None is 0 for all rows.
        ends ((R,) int64): one past the last position.
    """

    starts: torch.Tensor | None
    ends: torch.Tensor


# Global variables: torch.compile guards on them, but cannot trace a ContextVar and treats the value of a
# threading.local as a constant. So one thread at a time has a window, and the others get None.
_window: DecodeWindow | None = None
_owner = 0  # the thread that opened it
_turn = RLock()


def current_decode_window() -> DecodeWindow | None:
    """Return this thread's window. Traced code cannot query its thread; it runs in the one that opened the window."""
    mine = torch.compiler.is_compiling() or _owner == get_ident()
    return _window if mine else None


@contextmanager
def decode_window(starts: torch.Tensor | None, ends: torch.Tensor) -> Iterator[DecodeWindow]:
    """Make decoding steps of "nlhf_decode" attention read these ranges, in this thread, inside the block.

    Another thread that opens a window waits until this one is closed. The tensors' values are read by the kernels of
    each step: update them in place (`window.ends.add_(1)`), inside a captured graph too.

    Args:
        starts ((R,) int64): each row's first position; None is 0.
        ends ((R,) int64): one past each row's last position.
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
