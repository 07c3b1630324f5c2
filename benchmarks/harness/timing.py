"""Timing: medians over cold-cache repeats, interleaved over implementations; hot back-to-back calls for overhead."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

MIB = 1 << 20


@dataclass(frozen=True)
class Action:
    """One thing to time: `run(prepare())`, of which only `run` counts."""

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]


@dataclass(frozen=True)
class TimingPlan:
    """How long to measure. The budget is for one implementation in one mode, preparation and flushing included."""

    budget_s: float
    min_repeats: int
    max_repeats: int
    warmups: int
    batch_s: float  # overhead mode: least duration of one batch of back-to-back calls
    flush_bytes: int  # written before every repeat; 0 = hot caches

    @property
    def cache(self) -> str:
        return "cold" if self.flush_bytes else "hot"


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call."""

    median_us: float
    p20_us: float
    p80_us: float
    repeats: int
    cache: str
    flush_bytes: int


def plan_for(preset: str, last_level_cache_bytes: int, device: torch.device) -> TimingPlan:
    """Return the plan of a preset: tiny takes few repeats with hot caches, the others flush the last-level cache."""
    if preset == "tiny":
        return TimingPlan(budget_s=0.05, min_repeats=3, max_repeats=10, warmups=1, batch_s=0.001, flush_bytes=0)
    # On a GPU, writing 256 MiB also takes longer than one kernel launch. This hides the launch as earlier work does in
    # a real program; further launches stay visible.
    flush = max(256 * MIB, 4 * last_level_cache_bytes) if device.type == "cuda" else last_level_cache_bytes * 5 // 4
    # growth has many shapes and tolerates noise; all headline shapes must fit into minutes of GPU time
    budget_s = {"growth": 2.0, "headline": 0.4}.get(preset, 4.0)
    return TimingPlan(budget_s=budget_s, min_repeats=5, max_repeats=200, warmups=3, batch_s=0.005, flush_bytes=flush)


def percentile(samples: Sequence[float], fraction: float) -> float:
    """Interpolate linearly between the order statistics; fraction 0.5 is the median."""
    if not samples:
        raise ValueError("percentile: expected at least one sample, got none")
    ordered = sorted(samples)
    position = fraction * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def summarise(samples_us: Sequence[float], flush_bytes: int) -> Timing:
    return Timing(
        median_us=statistics.median(samples_us),
        p20_us=percentile(samples_us, 0.2),
        p80_us=percentile(samples_us, 0.8),
        repeats=len(samples_us),
        cache="cold" if flush_bytes else "hot",
        flush_bytes=flush_bytes,
    )


@contextmanager
def objects_frozen() -> Iterator[None]:
    """Keep the objects that exist now out of garbage collections, of which every measurement begins with one: searching
    through the modules of PyTorch alone takes longer than most measurements."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _no_collector() -> Iterator[None]:
    """Keep the garbage collector out of the samples."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def answers(device: torch.device) -> bool:
    """Return whether the device takes work of this process: after an illegal access a GPU takes none."""
    try:
        synchronise(device)
    except RuntimeError:
        return False
    return True


class Clock:
    """Times one run of an action on a device, with the caches flushed before it."""

    def __init__(self, device: torch.device, flush_bytes: int) -> None:
        self.device = device
        self._flush = torch.zeros(flush_bytes, dtype=torch.uint8, device=device) if flush_bytes else None
        self._value = 0

    def _flush_caches(self) -> None:
        if self._flush is not None:
            self._value = (self._value + 1) % 256
            self._flush.fill_(self._value)

    def sample_us(self, action: Action) -> float:
        state = action.prepare()
        if self.device.type != "cuda":
            self._flush_caches()
            start = time.perf_counter_ns()
            result = action.run(state)
            elapsed = (time.perf_counter_ns() - start) / 1e3
            del result
            return elapsed
        start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # Start with an idle GPU: launch time that the flush does not cover counts.
        synchronise(self.device)
        self._flush_caches()
        start_event.record()
        action.run(state)
        end_event.record()
        end_event.synchronize()
        return float(start_event.elapsed_time(end_event)) * 1e3


@dataclass
class _Entry:
    sample_us: Callable[[], float]
    samples: list[float]
    spent_s: float = 0.0
    failure: Exception | None = None

    def wants_more(self, plan: TimingPlan) -> bool:
        if self.failure is not None or len(self.samples) >= plan.max_repeats:
            return False
        return len(self.samples) < plan.min_repeats or self.spent_s < plan.budget_s


def _step(entry: _Entry) -> None:
    start = time.perf_counter()
    try:
        entry.samples.append(entry.sample_us())
    except Exception as error:  # such as out of memory: only this implementation has no time
        entry.failure = error
    entry.spent_s += time.perf_counter() - start


def round_robin(
    samplers: Mapping[str, Callable[[], float]], plan: TimingPlan, flush_bytes: int
) -> dict[str, Timing | Exception]:
    """Sample all implementations in turn, so that clock drift and other load affect all of them alike."""
    entries = {name: _Entry(sampler, []) for name, sampler in samplers.items()}
    with _no_collector():
        for entry in entries.values():
            for warmed in range(plan.warmups):
                if entry.failure is None and (warmed == 0 or entry.spent_s < plan.budget_s):
                    _step(entry)
            entry.samples.clear()
            entry.spent_s = 0.0
        while any(entry.wants_more(plan) for entry in entries.values()):
            for entry in entries.values():
                if entry.wants_more(plan):
                    _step(entry)
    return {name: entry.failure or summarise(entry.samples, flush_bytes) for name, entry in entries.items()}


def time_calls(actions: Mapping[str, Action], device: torch.device, plan: TimingPlan) -> dict[str, Timing | Exception]:
    """Time the actions in turn, each from cold caches (plan.flush_bytes)."""
    clock = Clock(device, plan.flush_bytes)
    samplers = {name: partial(clock.sample_us, action) for name, action in actions.items()}
    return round_robin(samplers, plan, plan.flush_bytes)


def time_overhead(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, plan: TimingPlan
) -> dict[str, Timing | Exception]:
    """Measure the wall time per call of many back-to-back calls with hot caches, ended by one synchronisation."""

    def batch_us(call: Callable[[], Any], count: int) -> float:
        start = time.perf_counter_ns()
        for _ in range(count):
            call()
        synchronise(device)
        return (time.perf_counter_ns() - start) / 1e3

    def batch_size(call: Callable[[], Any]) -> int:
        count = 1
        # Take the fastest of three: a preempted batch would look long enough and end the search at too few calls.
        while min(batch_us(call, count) for _ in range(3)) < plan.batch_s * 1e6:
            count *= 2
        return count

    sizes: dict[str, int] = {}

    def measured(name: str, call: Callable[[], Any]) -> float:
        if name not in sizes:
            sizes[name] = batch_size(call)
        batch_us(call, 1 + sizes[name] // 10)  # warm the caches after the previous implementation
        return batch_us(call, sizes[name]) / sizes[name]

    return round_robin({name: partial(measured, name, call) for name, call in calls.items()}, plan, 0)
