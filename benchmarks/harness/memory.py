"""Peak memory of one call beyond its inputs, outputs included.

GPU: PyTorch's allocator statistics. CPU: the allocation events that PyTorch's profiler records. Both cover PyTorch's
allocators only, not a workspace that native code allocates with malloc or cudaMalloc.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .timing import Action, synchronise

METHODS = {"cuda": "torch.cuda.max_memory_allocated", "cpu": "torch.profiler allocation events"}


def peak_of_changes(changes: Iterable[int]) -> int:
    """Return the highest level that a sequence of allocations (+) and frees (-) reaches above its start."""
    level = peak = 0
    for change in changes:
        level += change
        peak = max(peak, level)
    return peak


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Suppress the process's stderr, to which some PyTorch builds print whenever the profiler starts or stops."""
    sys.stderr.flush()
    stderr = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(sink)
        os.close(stderr)


def _peak_on_cpu(action: Action) -> int:
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    state = action.prepare()
    gc.collect()
    with _quiet_stderr():
        profiler.start()
    try:
        result = action.run(state)
    finally:
        with _quiet_stderr():
            profiler.stop()
    del result
    # Use the flat list of events: torch.profiler's tables attribute allocations to operators and lose their order.
    recorded: Any = profiler.profiler
    cpu = torch.autograd.DeviceType.CPU
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    on_cpu = [event for event in events if event.device_type() == cpu]
    return peak_of_changes(event.nbytes() for event in sorted(on_cpu, key=lambda event: event.start_ns()))


def held_bytes(device: torch.device) -> int:
    """Return the bytes that a GPU holds now, and count `peak_above` from here on."""
    torch.cuda.reset_peak_memory_stats(device)
    return int(torch.cuda.memory_allocated(device))


def peak_above(held: int, device: torch.device) -> int:
    """Return the peak beyond `held` since `held_bytes` returned it."""
    return int(torch.cuda.max_memory_allocated(device)) - held


def _peak_on_gpu(action: Action, device: torch.device) -> int:
    state = action.prepare()
    gc.collect()
    synchronise(device)
    held = held_bytes(device)
    result = action.run(state)
    synchronise(device)
    peak = peak_above(held, device)
    del result
    return peak


def peak_bytes(action: Action, device: torch.device) -> int:
    """Return the peak of the bytes held during `action.run`, beyond those held before it."""
    return _peak_on_gpu(action, device) if device.type == "cuda" else _peak_on_cpu(action)
