"""The test helpers: tolerances, statistics and memory poisoning reject wrong results and pass right ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.cases import all_cases
from nlhf_kernels.core.registry import ops
from tests.support import statistics
from tests.support.poison import poison, poisoned_allocations, surrounded
from tests.support.statistics import ALPHA, CHECKS, FAMILY_ALPHA, assert_plausible, chi_square_p, mean_z, normal_p
from tests.support.tolerances import assert_accurate, worst_error
from tests.test_gpu_ops import REAL, made_calls
from tests.test_operators import backward


def test_accuracy_is_held_against_pytorch_at_the_same_dtype() -> None:
    exact = torch.randn(1000, dtype=torch.float64).exp()
    pytorch = exact.bfloat16()
    assert_accurate(pytorch.clone(), exact, pytorch)
    with pytest.raises(AssertionError, match="error .* allowed"):
        assert_accurate((exact * 1.05).bfloat16(), exact, pytorch)
    with pytest.raises(AssertionError, match="error inf"):
        assert_accurate(torch.full_like(pytorch, torch.nan), exact, pytorch)
    with pytest.raises(AssertionError, match="shape"):
        assert_accurate(pytorch[:10], exact, pytorch)
    with pytest.raises(AssertionError, match="dtype"):
        assert_accurate(pytorch.float(), exact, pytorch)


def test_infinities_and_nan_count_as_equal_only_to_themselves() -> None:
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0], dtype=torch.float64)
    assert worst_error(special, special) == 0
    for index in range(4):
        wrong = special.clone()
        wrong[index] = 0.0 if index < 3 else torch.nan
        assert worst_error(wrong, special) == torch.inf


def test_chi_square_accepts_the_truth_and_rejects_a_lie() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(500) * 0.3)
    counts = rng.multinomial(100_000, probabilities)
    assert_plausible(chi_square_p(counts, probabilities), "the truth")
    tilted = probabilities * np.linspace(0.9, 1.1, 500)
    with pytest.raises(AssertionError, match="a lie"):
        assert_plausible(chi_square_p(counts, tilted / tilted.sum()), "a lie")


def test_chi_square_of_an_impossible_event_is_zero() -> None:
    assert chi_square_p(np.array([10, 1]), np.array([1.0, 0.0])) == 0.0


def test_chi_square_p_values_are_calibrated() -> None:
    """Under the null hypothesis the p-values are uniform, also with sparse bins."""
    rng = np.random.default_rng(1)
    probabilities = rng.dirichlet(np.ones(200) * 0.2)
    values = [chi_square_p(rng.multinomial(3000, probabilities), probabilities) for _ in range(2000)]
    assert_plausible(statistics.uniform_p(np.array(values)), "calibration")


def test_false_alarm_rates_add_up_to_the_stated_one() -> None:
    assert pytest.approx(FAMILY_ALPHA) == ALPHA * CHECKS
    assert normal_p(5.0) == pytest.approx(5.733e-7, rel=1e-3)
    assert abs(mean_z(np.full(400, 0.5), 0.4, 1.0)) == pytest.approx(2.0)
    assert statistics.proportion_p(50, 100, 0.5) == pytest.approx(1.0)
    assert statistics.proportion_p(100, 100, 0.5) < 1e-20


def test_poison_shows_what_was_not_written() -> None:
    with poisoned_allocations() as handed_out:
        assert torch.empty(3).isnan().all()
        assert (torch.empty_like(torch.zeros(2, dtype=torch.int64)) < -(2**61)).all()
    assert handed_out == [3, 2]
    assert poison(torch.zeros(2, dtype=torch.int32)).eq(2**31 - 1).all()


def test_surrounded_keeps_values_and_poisons_the_margin() -> None:
    inner = surrounded(torch.arange(6.0).view(2, 3), margin=4)
    assert torch.equal(inner, torch.arange(6.0).view(2, 3))
    storage = torch.empty(0).set_(inner.untyped_storage())
    assert storage[:4].isnan().all()
    assert storage[-4:].isnan().all()


@pytest.mark.parametrize("op", [op.name for op in ops() if "torch" not in op.absent])
def test_the_calls_of_the_gpu_tests_run(op) -> None:
    """Calls that only a GPU's tests make are correct Python on every machine."""
    for call in made_calls(op, "torch"):
        backward(call())


def test_the_gpu_tests_measure_every_case_at_a_real_size() -> None:
    assert {name for name, _ in REAL} == set(all_cases())
