"""Statistical tests with a bounded rate of false alarms.

Every check compares a p-value with FAMILY_ALPHA / CHECKS (Bonferroni): a run of the whole suite on correct code raises
a false alarm with probability at most FAMILY_ALPHA, as long as it makes at most CHECKS checks. Seeds are fixed, so a
run that passed keeps passing; the rate applies to the choice of seeds.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

FAMILY_ALPHA = 1e-6
CHECKS = 1000
ALPHA = FAMILY_ALPHA / CHECKS


def chi_square_p(counts: np.ndarray, probabilities: np.ndarray, min_expected: float = 5.0) -> float:
    """Return the p-value of `counts` under `probabilities`; bins with few expected counts are pooled.

    A count in a bin of probability 0 gives p = 0.
    """
    counts, probabilities = np.asarray(counts, float), np.asarray(probabilities, float)
    if abs(probabilities.sum() - 1) > 1e-9:
        raise ValueError(f"probabilities: expected a sum of 1; got {probabilities.sum()}")
    if (counts[probabilities == 0] > 0).any():
        return 0.0
    expected = probabilities * counts.sum()
    order = np.argsort(expected)
    counts, expected = counts[order], expected[order]
    small = int(np.searchsorted(np.cumsum(expected), min_expected)) + 1 if expected[0] < min_expected else 0
    while 0 < small < len(expected) and expected[small] < min_expected:
        small += 1
    if small:
        counts = np.append(counts[small:], counts[:small].sum())
        expected = np.append(expected[small:], expected[:small].sum())
    nonempty = expected > 0
    if nonempty.sum() < 2:
        return 1.0
    statistic = float(((counts - expected)[nonempty] ** 2 / expected[nonempty]).sum())
    return float(stats.chi2.sf(statistic, int(nonempty.sum()) - 1))


def proportion_p(successes: int, trials: int, probability: float) -> float:
    """Return the exact two-sided binomial p-value."""
    return float(stats.binomtest(int(successes), int(trials), probability).pvalue)


def mean_z(samples: np.ndarray, mean: float, deviation: float) -> float:
    """Return the z-score of a sample mean against a known mean and standard deviation."""
    return float((np.mean(samples) - mean) / (deviation / math.sqrt(len(samples))))


def normal_p(z: float) -> float:
    return float(2 * stats.norm.sf(abs(z)))


def uniform_p(samples: np.ndarray) -> float:
    """Return the Kolmogorov-Smirnov p-value of samples in (0, 1)."""
    return float(stats.kstest(samples, "uniform").pvalue)


def assert_plausible(p: float, what: str) -> None:
    assert p >= ALPHA, f"{what}: p = {p:.3g}, below {ALPHA:.1g} (one false alarm in {1 / FAMILY_ALPHA:.0g} runs)"
