"""Confidence intervals of a mean win rate: over prompts, and over training runs where there are several."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import torch

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
        return asdict(self)


def plus_minus(mean: float, half: float, digits: int = 3) -> str:
    """ "mean ± half" with no-break spaces, so that no line breaks inside; what rounds to zero has no sign.

    Args:
        mean, half (float): the two numbers.
        digits (int): after the point.
    """
    return f"{round(mean, digits) + 0.0:.{digits}f}\u00a0±\u00a0{half:.{digits}f}"


def estimate_mean(values: torch.Tensor, comparisons: int = 1) -> Estimate:
    """The mean over runs and prompts with its interval, as both are samples of more.

    half^2 = (z s_p / sqrt P)^2 + (t s_s / sqrt S)^2, with s_p the deviation of the prompts' means over the seeds, s_s
    that of the seeds' means over the prompts. The second term needs two seeds: with one, the interval speaks of these
    trained policies on other prompts, not of other training runs.

    Args:
        values (tensor (seeds, prompts)): one value for each run and prompt.
        comparisons (int): number of estimates from which the best is picked; the interval is widened for the choice
            (Bonferroni: 1 - 5 % / comparisons each).
    """
    seeds, prompts = values.shape
    if prompts < 2:
        raise ValueError(f"estimate_mean: values: expected at least 2 prompts; got {prompts}")
    values, tail = values.double(), 0.025 / comparisons
    square = (NormalDist().inv_cdf(1 - tail) * float(values.mean(0).std()) / prompts**0.5) ** 2
    if seeds > 1:
        square += (student(seeds - 1, tail) * float(values.mean(1).std()) / seeds**0.5) ** 2
    return Estimate(float(values.mean()), square**0.5, prompts, seeds)


def student(degrees: int, tail: float) -> float:
    """The quantile that Student's t exceeds with probability `tail`: for few runs the normal's is far too small.

    Args:
        degrees (int): degrees of freedom, at least 1.
        tail (float): below 1/2.

    With t = sqrt(degrees) tan(angle), the density of the angle is cos(angle)^(degrees - 1), scaled.
    """
    steps = 20_000
    angles = (torch.arange(steps, dtype=torch.float64, device="cpu") + 0.5) * (math.pi / 2 / steps)
    mass = angles.cos() ** (degrees - 1)
    beyond = mass.flip(0).cumsum(0).flip(0) / (2 * mass.sum())  # P(angle >= the cell's lower edge)
    cell = int((beyond > tail).sum()) - 1
    inside = (float(beyond[cell]) - tail) * 2 * float(mass.sum()) / float(mass[cell])  # share of the cell
    return math.sqrt(degrees) * math.tan((cell + inside) * math.pi / 2 / steps)
