"""How good a judge is on pairs that people have judged: accuracy, and whether its probabilities can be believed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..core.checks import check_integer
from ..data import Pair
from .judges import Judge, checked

SMALLEST = 1e-7  # probabilities below count as this in the log-loss, so that one sure mistake leaves it finite


@dataclass(frozen=True)
class Bin:
    """Pairs of which the judge was about equally sure."""

    low: float
    high: float
    count: int
    confidence: float  # mean of max(P, 1 - P)
    accuracy: float  # how often the likelier response was the chosen one


@dataclass(frozen=True)
class Evaluation:
    count: int
    accuracy: float  # a tie, P = 1/2, counts one half
    log_loss: float  # mean of -log P(chosen > rejected); log 2 is knowing nothing
    calibration_error: float  # expected calibration error: |accuracy - confidence| of the bins, weighted by count
    bins: tuple[Bin, ...]  # of confidence, from 1/2 to 1; empty ones left out


def evaluate(judge: Judge, pairs: Sequence[Pair], *, bins: int = 10) -> Evaluation:
    """`judge` asked about every pair; every second one with the rejected response first, so that a judge who likes the
    first place is not taken for one who likes the chosen response."""
    if not pairs:
        raise ValueError("evaluate: pairs: expected at least one; got none")
    asked = [(p, rejected, chosen) if n % 2 else (p, chosen, rejected) for n, (p, chosen, rejected) in enumerate(pairs)]
    answers = checked(judge)(*(list(column) for column in zip(*asked, strict=True))).clone()
    answers[1::2] = 1.0 - answers[1::2]
    return reliability(answers, bins=bins)


def reliability(probabilities: torch.Tensor, *, bins: int = 10) -> Evaluation:  # (N,), P(chosen > rejected)
    """The measures of probabilities that were all meant to be 1."""
    check_integer("reliability", "bins", bins, 1, 1000)
    p = probabilities.double()
    if p.ndim != 1 or not len(p) or not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError(f"reliability: probabilities: expected some in [0, 1], of shape (N,); got {probabilities}")
    confidence = torch.maximum(p, 1 - p)
    right = (p > 0.5).double() + 0.5 * (p == 0.5).double()
    place = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    filled = []
    for index in sorted(set(place.tolist())):
        inside = place == index
        low, high = (0.5 + edge / (2 * bins) for edge in (index, index + 1))
        filled.append(Bin(low, high, int(inside.sum()), float(confidence[inside].mean()), float(right[inside].mean())))
    error = sum(bin.count * abs(bin.accuracy - bin.confidence) for bin in filled) / len(p)
    log_loss = -p.clamp(min=SMALLEST).log().mean()
    return Evaluation(len(p), float(right.mean()), float(log_loss), error, tuple(filled))
