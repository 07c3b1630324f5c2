"""Numbers that change during training: beta and tau as a number, a list by epoch, a dict or a function by step."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

RANGES = {"beta": (0.0, 1.0), "tau": (0.0, math.inf)}
Schedule = float | list[float] | dict[int, float] | Callable[[int], float]
OP = "NashConfig"


def check_schedule(name: str, given: Any, open_low: bool = False) -> Schedule:
    """`given` with its numbers checked; a function's are checked as they come, by `value_at`."""
    low, high = RANGES[name]
    if callable(given):
        try:
            pickle.dumps(given)
        except Exception as error:  # pickle has many ways to say no
            raise ValueError(
                f"{OP}: {name}: expected a function that a checkpoint can hold, one that a module defines; "
                f"got {given!r}: {error}"
            ) from error
        return given  # type: ignore[no-any-return]
    if isinstance(given, list | tuple):
        if not given:
            raise ValueError(f"{OP}: {name}: expected a number for every epoch; got an empty list")
        return [_check(f"{name}[{epoch}]", value, low, high, open_low) for epoch, value in enumerate(given)]
    if isinstance(given, dict):
        steps = {_step(name, key): value for key, value in given.items()}
        if 0 not in steps:
            raise ValueError(f"{OP}: {name}: expected the value from step 0 on among them; got steps {sorted(steps)}")
        return {step: _check(f"{name}[{step}]", steps[step], low, high, open_low) for step in sorted(steps)}
    return _check(name, given, low, high, open_low)


def value_at(name: str, schedule: Schedule, step: int, epoch: float) -> float:
    """The value for update `step`, counted from 0, which begins at the (fractional) `epoch`.

    A list's entry i holds during epoch i, its last entry ever after; a dict's from its step on, until the next.
    """
    if callable(schedule):
        return _check(f"{name}({step})", schedule(step), *RANGES[name], False)
    if isinstance(schedule, list):
        return schedule[min(int(epoch + 1e-9), len(schedule) - 1)]
    if isinstance(schedule, dict):
        return schedule[max(start for start in schedule if start <= step)]
    return schedule


def _step(name: str, key: Any) -> int:
    """YAML and JSON know keys as text."""
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
        wanted = f"{'(' if open_low else '['}{low}, {high}{']' if math.isfinite(high) else ')'}"
        raise ValueError(f"{OP}: {name}: expected a finite number in {wanted}; got {value!r}")
    return float(value)
