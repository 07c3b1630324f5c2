"""Measures of a judge on pairs that people have judged: accuracy, log-loss and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..core.checks import check_integer
from ..data import Pair
from ..data.pairs import check_pairs
from .judges import Judge, checked

SMALLEST = 1e-7  # lower bound of probabilities in the log-loss, which keeps it finite


@dataclass(frozen=True)
class Bin:
    """A bin of a reliability diagram: pairs with about the same confidence max(P, 1 - P).

    Args:
        low, high: bounds of the confidence.
        count: pairs in the bin.
        confidence: its mean over these pairs.
        accuracy: how often the likelier response was the chosen one.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Evaluation:
    """Measures of a judge.

    Args:
        count: pairs.
        accuracy: how often the chosen response was the likelier one; a tie, P = 1/2, counts one half.
        log_loss: mean of -log P(chosen > rejected); log 2 is that of P = 1/2.
        calibration_error: expected calibration error, |accuracy - confidence| of the bins weighted by count.
        bins: of confidence, from 1/2 to 1, without empty ones.
    """

    count: int
    accuracy: float
    log_loss: float
    calibration_error: float
    bins: tuple[Bin, ...]


def evaluate(judge: Judge, pairs: Sequence[Pair], *, bins: int = 10) -> Evaluation:
    """Return the measures of a judge on pairs.

    Every second pair is presented with the rejected response first, so that a bias towards the first position does not
    count as accuracy.

    Args:
        judge: any judge.
        pairs: judged by people.
        bins: of the reliability diagram.
    """
    if not pairs:
        raise ValueError("evaluate: pairs: expected at least one; got none")
    check_pairs("evaluate", pairs)
    rows = [(p, rejected, chosen) if n % 2 else (p, chosen, rejected) for n, (p, chosen, rejected) in enumerate(pairs)]
    probabilities = checked(judge)(*(list(column) for column in zip(*rows, strict=True))).clone()
    probabilities[1::2] = 1.0 - probabilities[1::2]
    return reliability(probabilities, bins=bins)


def reliability(probabilities: torch.Tensor, *, bins: int = 10) -> Evaluation:
    """Return the measures of probabilities that the chosen response is preferred.

    Args:
        probabilities ((N,)): P(chosen > rejected) of each pair.
        bins: of the reliability diagram.
    """
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
