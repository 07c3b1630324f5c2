"""Poisoned memory: fill what `torch.empty` returns with NaN to detect elements left unwritten, and embed inputs in
larger NaN-filled storage to detect reads past their end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from nlhf_kernels.core import tuning, upstream

_POISON_INTEGER = -(2**62) + 3


def poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point():
        return tensor.fill_(torch.nan)
    if tensor.dtype == torch.int64:
        return tensor.fill_(_POISON_INTEGER)
    return tensor.fill_(1) if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)


@contextmanager
def poisoned_allocations() -> Iterator[list[int]]:
    """Make torch.empty, torch.empty_like and prepared calls allocate poisoned memory; yield the list of sizes."""
    handed_out: list[int] = []

    def poisoned(function: Any) -> Any:
        def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = poison(function(*args, **kwargs))
            handed_out.append(tensor.numel())
            return tensor

        return allocate

    allocator = upstream.allocator
    with (
        mock.patch.object(torch, "empty", poisoned(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoned(torch.empty_like)),
        mock.patch.object(upstream, "allocator", lambda device: poisoned(allocator(device))),
    ):
        tuning.forget_plans()  # so that calls are prepared anew
        yield handed_out
    tuning.forget_plans()


def surrounded(tensor: torch.Tensor, margin: int = 64) -> torch.Tensor:
    """Copy `tensor`, contiguous, into the middle of poisoned storage."""
    storage = poison(torch.zeros(tensor.numel() + 2 * margin, dtype=tensor.dtype, device=tensor.device))
    view = storage[margin : margin + tensor.numel()].view(tensor.shape)
    return view.copy_(tensor)
