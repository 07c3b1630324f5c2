"""Random calls of the public ops on every backend that can run here, against the oracle in float64.

Each case number is a fixed call; `--fuzz-seconds` (all ops together) determines how many run.
"""

from __future__ import annotations

import time
from collections import Counter

import pytest

from tests.support import fuzz

LEAST = 8  # minimum number of cases per op


@pytest.mark.parametrize("op", fuzz.BUILDERS)
def test_random_calls_match_float64(op, request) -> None:
    deadline = time.monotonic() + request.config.getoption("--fuzz-seconds") / len(fuzz.BUILDERS)
    backends = request.config.getoption("--fuzz-backends").split(",")
    runs: Counter[str] = Counter()
    number = 0
    while number < LEAST or time.monotonic() < deadline:
        runs.update(fuzz.check(op, number, backends))
        number += 1
    assert sum(runs.values()) >= number
    print(f"{op}: {number} cases; {dict(runs)}")


def test_a_wrong_result_is_found() -> None:
    """The comparison rejects one wrong number among many, an infinity, and a NaN."""
    import torch

    truth = torch.linspace(-5, 0, 1000, dtype=torch.float64)
    for wrong in (-2.4, float("inf"), float("nan")):
        result = truth.float()
        fuzz.assert_close(result, truth, truth.float(), 10.0)
        result[517] = wrong
        with pytest.raises(AssertionError, match=r"1 of 1000 elements differ; at \[517\]"):
            fuzz.assert_close(result, truth, truth.float(), 10.0)


@pytest.mark.parametrize("op", fuzz.BUILDERS)
def test_a_number_gives_the_same_call(op) -> None:
    first, second = (fuzz.describe(fuzz.BUILDERS[op](fuzz.Draw(op, 5))) for _ in range(2))
    assert first == second
