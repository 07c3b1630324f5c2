"""Schedules of beta and tau: a number, a list by epoch, a dict by step, or a function of the step."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

RANGES = {"beta": (0.0, 1.0), "tau": (0.0, math.inf)}
Schedule = float | list[float] | dict[int, float] | Callable[[int], float]
OP = "NashConfig"


def check_schedule(name: str, schedule: Any, open_low: bool = False) -> Schedule:
    """Return `schedule` with its numbers checked; those of a function are checked by `value_at`.

    Args:
        name: "beta" or "tau".
        schedule: a number, a list by epoch, {step: value} or a function of the step.
        open_low: refuse the lower bound, too.
    """
    low, high = RANGES[name]
    if callable(schedule):
        try:
            pickle.dumps(schedule)
        except Exception as error:  # pickle raises many types of exceptions
            raise ValueError(
                f"{OP}: {name}: expected a function that a checkpoint can hold, one that a module defines; "
                f"got {schedule!r}: {error}"
            ) from error
        return schedule  # type: ignore[no-any-return]
    if isinstance(schedule, list | tuple):
        if not schedule:
            raise ValueError(f"{OP}: {name}: expected a number for every epoch; got an empty list")
        return [_check(f"{name}[{epoch}]", value, low, high, open_low) for epoch, value in enumerate(schedule)]
    if isinstance(schedule, dict):
        steps = {_step(name, key): value for key, value in schedule.items()}
        if 0 not in steps:
            raise ValueError(f"{OP}: {name}: expected the value from step 0 on among them; got steps {sorted(steps)}")
        return {step: _check(f"{name}[{step}]", steps[step], low, high, open_low) for step in sorted(steps)}
    return _check(name, schedule, low, high, open_low)


def value_at(name: str, schedule: Schedule, step: int, epoch: float) -> float:
    """Return the value for an update.

    A list's entry i holds during epoch i, its last entry ever after; a dict's entry from its step until the next one.

    Args:
        name: "beta" or "tau".
        schedule: as returned by `check_schedule`.
        step: number of the update, from 0.
        epoch: the (fractional) epoch at which it begins.
    """
    if callable(schedule):
        return _check(f"{name}({step})", schedule(step), *RANGES[name], False)
    if isinstance(schedule, list):
        return schedule[min(int(epoch + 1e-9), len(schedule) - 1)]
    if isinstance(schedule, dict):
        return schedule[max(start for start in schedule if start <= step)]
    return schedule


def _step(name: str, key: Any) -> int:
    """Return a dict's key as a step; YAML and JSON have keys as text."""
    try:
        step = int(key)
    except (TypeError, ValueError):
        step = -1
    if step < 0 or step != float(key):
        raise ValueError(f"{OP}: {name}: expected steps, 0 or more, as keys; got {key!r}")
    return step


def _check(name: str, value: Any, low: float, high: float, open_low: bool) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and (low < value if open_low else low <= value) and value <= high):
        interval = f"{'(' if open_low else '['}{low}, {high}{']' if math.isfinite(high) else ')'}"
        raise ValueError(f"{OP}: {name}: expected a finite number in {interval}; got {value!r}")
    return float(value)
