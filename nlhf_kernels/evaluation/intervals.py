"""Estimates with confidence intervals: over prompts, and over training runs where there are several.

Both intervals are half^2 = (z e_p)^2 + (t e_s)^2, with e_p the standard error over prompts, e_s that over runs, z the
normal's quantile and t Student's with S - 1 degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import torch

from ..core.checks import check_integer

NORMAL = NormalDist().inv_cdf(0.975)  # standard errors in a 95 % interval


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval, mean +- half: 95 % confidence, or more where it was widened.

    Args:
        mean (float): the estimate.
        half (float): half the interval's width.
        prompts (int): prompts behind it.
        seeds (int): training runs behind it.
    """

    mean: float
    half: float
    prompts: int
    seeds: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def __str__(self) -> str:
        return plus_minus(self.mean, self.half)

    def to_dict(self) -> dict[str, Any]:
        """The four numbers, for JSON."""
        return asdict(self)


def plus_minus(mean: float, half: float, digits: int = 3) -> str:
    """Format "mean ± half" with no-break spaces; a mean that rounds to zero has no sign.

    Args:
        mean, half (float): the two numbers.
        digits (int): after the point.
    """
    return f"{round(mean, digits) + 0.0:.{digits}f}\u00a0±\u00a0{half:.{digits}f}"


def estimate_mean(values: torch.Tensor, comparisons: int = 1) -> Estimate:
    """Return the mean over runs and prompts with its interval; both are samples of larger populations.

    e_p is the deviation of the prompts' means over the runs / sqrt P, e_s that of the runs' means over the prompts /
    sqrt S: the limits of `bootstrap`. With one run there is no e_s: the interval covers these trained policies on
    other prompts, not other training runs.

    Args:
        values (tensor (seeds, prompts)): one value for each run and prompt.
        comparisons (int): number of estimates from which the best is picked; the interval is widened for the choice
            (Bonferroni: 1 - 5 % / comparisons each).
    """
    seeds, prompts = values.shape
    if prompts < 2:
        raise ValueError(f"estimate_mean: values: expected at least 2 prompts; got {prompts}")
    values = values.double()
    prompt_error = float(values.mean(0).std()) / prompts**0.5
    run_error = float(values.mean(1).std()) / seeds**0.5 if seeds > 1 else 0.0
    half = _half_width(prompt_error, run_error, seeds, comparisons)
    return Estimate(float(values.mean()), half, prompts, seeds)


@dataclass(frozen=True)
class Weights:
    """B resamples of runs and prompts; each row sums to 1.

    Args:
        runs (tensor (B, S), float64): weight of each run.
        prompts (tensor (B, P), float64): weight of each prompt.
    """

    runs: torch.Tensor
    prompts: torch.Tensor

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The weighted mean over the last two dimensions in every resample, (B, ...) float64.

        Args:
            values (tensor (..., S, P)): one value for each run and prompt.
        """
        over_prompts = values.double() @ self.prompts.T  # (..., S, B)
        return (over_prompts * self.runs.T).sum(-2).movedim(-1, 0)


def bootstrap(
    statistic: Callable[[Weights], torch.Tensor],
    runs: int,
    prompts: int,
    comparisons: int = 1,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Return any statistic of runs and prompts with its interval, by resampling one of them at a time.

    n - 1 are drawn of n with replacement, which makes the resampled variance of a mean unbiased (Rao and Wu, 1988). All
    parts of a statistic are computed from the same resamples, so their common errors cancel as they do in the data.

    Args:
        statistic (callable): Weights of B resamples -> tensor (B,), through `Weights.mean`.
        runs (int): training runs, S; with one the interval covers these trained policies alone.
        prompts (int): P, at least 2.
        comparisons (int): number of estimates from which the best is picked, for which the interval is widened.
        resamples (int): of prompts and of runs, each.
        seed (int): of the resampling.
    """
    check_integer("bootstrap", "runs", runs, 1, 10**6)
    check_integer("bootstrap", "prompts", prompts, 2, 10**9)
    check_integer("bootstrap", "resamples", resamples, 2, 10**6)
    generator = torch.Generator().manual_seed(seed)
    whole = Weights(_equal(runs), _equal(prompts))

    def error(weights: Weights) -> float:
        return float(statistic(weights).double().std())

    prompt_error = error(Weights(_equal(runs).expand(resamples, -1), _resample(prompts, resamples, generator)))
    run_error = 0.0
    if runs > 1:
        run_error = error(Weights(_resample(runs, resamples, generator), _equal(prompts).expand(resamples, -1)))
    half = _half_width(prompt_error, run_error, runs, comparisons)
    return Estimate(float(statistic(whole)[0]), half, prompts, runs)


def _equal(count: int) -> torch.Tensor:  # (1, count)
    return torch.full((1, count), 1 / count, dtype=torch.float64, device="cpu")


def _resample(count: int, resamples: int, generator: torch.Generator) -> torch.Tensor:  # (resamples, count)
    """Return the share of each of `count` items in count - 1 draws."""
    draws = torch.randint(count, (resamples, count - 1), generator=generator, dtype=torch.int64, device="cpu")
    ones = torch.ones(draws.shape, dtype=torch.float64, device="cpu")
    counts = torch.zeros(resamples, count, dtype=torch.float64, device="cpu").scatter_add_(1, draws, ones)
    return counts / (count - 1)


def _half_width(prompt_error: float, run_error: float, runs: int, comparisons: int) -> float:
    tail = 0.025 / comparisons
    square = (NormalDist().inv_cdf(1 - tail) * prompt_error) ** 2
    if runs > 1:
        square += (student(runs - 1, tail) * run_error) ** 2
    return float(square**0.5)


def student(degrees: int, tail: float) -> float:
    """The quantile that Student's t exceeds with probability `tail`: for few runs the normal's is far too small.

    With t = sqrt(degrees) tan(angle), the density of the angle is cos(angle)^(degrees - 1), scaled.

    Args:
        degrees (int): degrees of freedom, at least 1.
        tail (float): below 1/2.
    """
    steps = 20_000
    angles = (torch.arange(steps, dtype=torch.float64, device="cpu") + 0.5) * (math.pi / 2 / steps)
    mass = angles.cos() ** (degrees - 1)
    beyond = mass.flip(0).cumsum(0).flip(0) / (2 * mass.sum())  # P(angle >= the cell's lower edge)
    cell = int((beyond > tail).sum()) - 1
    inside = (float(beyond[cell]) - tail) * 2 * float(mass.sum()) / float(mass[cell])  # share of the cell
    return math.sqrt(degrees) * math.tan((cell + inside) * math.pi / 2 / steps)
