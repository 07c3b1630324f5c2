"""Win rates at equal KL: a method's policies over several tau, interpolated to a KL between theirs.

Between two policies the win rate is interpolated linearly in sqrt(KL). KL and win rates are means of the same runs and
prompts and are resampled together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .intervals import Estimate, Weights, bootstrap, estimate_mean
from .tournament import Tournament


class FrontierPoint(NamedTuple):
    """One policy of a frontier.

    Args:
        tau (float): strength of its regularisation.
        kl (Estimate): KL from the reference, nats per answer.
        rate (Estimate): win rate against the frontier's opponent.
    """

    tau: float
    kl: Estimate
    rate: Estimate


@dataclass(frozen=True)
class Frontier:
    """A method's N policies, one for each tau, against one opponent.

    Args:
        name (str): the method.
        taus (sequence of N floats): strength of the regularisation of each; infinity for the reference itself.
        kl (tensor (N, S, P)): KL from the reference of each policy, run and prompt (`kl_values`).
        rates (tensor (N, S, P)): P(policy > opponent) of each policy, run and prompt (`Tournament.match`).
    """

    name: str
    taus: Sequence[float]
    kl: torch.Tensor
    rates: torch.Tensor

    def __post_init__(self) -> None:
        if self.kl.ndim != 3 or self.kl.shape != self.rates.shape or len(self.kl) != len(self.taus):
            raise ValueError(
                f"frontier: {self.name}: expected kl and rates of one shape ({len(self.taus)}, runs, prompts); got "
                f"{tuple(self.kl.shape)} and {tuple(self.rates.shape)}"
            )
        if len(self.taus) < 2 or len(set(self.taus)) < len(self.taus):
            raise ValueError(f"frontier: {self.name}: taus: expected two or more, each once; got {list(self.taus)}")

    def points(self) -> list[FrontierPoint]:
        """The policies in the order of their KL."""
        points = [
            FrontierPoint(tau, estimate_mean(kl), estimate_mean(rates))
            for tau, kl, rates in zip(self.taus, self.kl, self.rates, strict=True)
        ]
        return sorted(points, key=lambda point: point.kl.mean)

    def at(self, kl: float, comparisons: int = 1) -> Estimate:
        """The win rate at a KL, with the interval of KLs and win rates together.

        Args:
            kl (float): within the range of the policies' KL.
            comparisons (int): number of estimates from which the best is picked.
        """
        _check_range({self.name: self.kl}, kl)
        _, runs, prompts = self.kl.shape
        return bootstrap(lambda weights: self.interpolated(weights, kl), runs, prompts, comparisons)

    def interpolated(self, weights: Weights, kl: float) -> torch.Tensor:
        """The win rate at a KL in each of B resamples, (B,).

        Args:
            weights (Weights): the resamples.
            kl (float): the KL.
        """
        return (interpolation(weights.mean(self.kl), kl) * weights.mean(self.rates)).sum(1)


def shared_range(frontiers: Sequence[Frontier]) -> tuple[float, float]:
    """Return the (lowest, highest) KL that the policies of every frontier span.

    Args:
        frontiers (sequence of Frontier): one or more.
    """
    return _shared_range({frontier.name: frontier.kl for frontier in frontiers})


def difference_at(first: Frontier, second: Frontier, kl: float, comparisons: int = 1) -> Estimate:
    """Return the win rate of `first` less that of `second` at a KL, against the same opponent.

    Args:
        first, second (Frontier): of the same runs and prompts.
        kl (float): within the range that both span.
        comparisons (int): number of estimates from which the best is picked.
    """
    if first.kl.shape[1:] != second.kl.shape[1:]:
        shapes = f"{tuple(first.kl.shape[1:])} and {tuple(second.kl.shape[1:])}"
        raise ValueError(f"frontier: expected as many runs and prompts of both; got {shapes}")
    _check_range({first.name: first.kl, second.name: second.kl}, kl)

    def difference(weights: Weights) -> torch.Tensor:
        return first.interpolated(weights, kl) - second.interpolated(weights, kl)

    _, runs, prompts = first.kl.shape
    return bootstrap(difference, runs, prompts, comparisons)


def rate_at_equal_kl(
    tournament: Tournament,
    first: Sequence[str],
    second: Sequence[str],
    kl: Mapping[str, torch.Tensor],
    at: float,
    comparisons: int = 1,
) -> Estimate:
    """The win rate of one method against another where both have the same KL from the reference.

    The win rates of all their policies against each other are interpolated in both KLs.

    Args:
        tournament (Tournament): with all policies of both methods.
        first, second (sequences of names): each method's policies; one alone, such as the reference, plays at its own
            KL.
        kl (mapping name -> tensor (S, P)): KL from the reference of each policy (`kl_values`).
        at (float): the KL, within the range that both methods span.
        comparisons (int): number of estimates from which the best is picked.
    """
    rates = torch.stack([torch.stack([tournament.match(a, b) for b in second]) for a in first])  # (N, M, S, P)
    runs, prompts = rates.shape[2:]
    sides = [torch.stack([kl[name].expand(runs, prompts) for name in names]) for names in (first, second)]
    several = {", ".join(names): values for names, values in zip((first, second), sides, strict=True) if len(names) > 1}
    if several:
        _check_range(several, at)

    def rate(weights: Weights) -> torch.Tensor:
        left, right = (interpolation(weights.mean(values), at) for values in sides)
        return torch.einsum("bn,bm,bnm->b", left, right, weights.mean(rates))

    return bootstrap(rate, runs, prompts, comparisons)


def interpolation(kl: torch.Tensor, at: float) -> torch.Tensor:
    """Return weights (B, N) of the two policies around a KL, linear in sqrt(KL); beyond the last policy, and for
    one alone, 1.

    Args:
        kl (tensor (B, N)): of N policies, in any order; estimates below 0 count as 0.
        at (float): the KL.
    """
    if kl.shape[1] == 1:
        return torch.ones_like(kl)
    positions, order = kl.clamp(min=0).sqrt().contiguous().sort(1)
    target = torch.full((len(kl), 1), max(at, 0.0) ** 0.5, dtype=positions.dtype, device=kl.device)
    right = torch.searchsorted(positions, target).clamp(1, kl.shape[1] - 1)
    below, above = positions.gather(1, right - 1), positions.gather(1, right)
    share = ((target - below) / (above - below).clamp(min=1e-12)).clamp(0, 1)
    weights = torch.zeros_like(positions).scatter_(1, right - 1, 1 - share).scatter_(1, right, share)
    return torch.zeros_like(weights).scatter_(1, order, weights)


def _shared_range(kl: Mapping[str, torch.Tensor]) -> tuple[float, float]:  # method -> (N, S, P)
    means = {name: values.double().mean((1, 2)) for name, values in kl.items()}
    low = max(float(mean.min()) for mean in means.values())
    high = min(float(mean.max()) for mean in means.values())
    if low > high:
        ranges = ", ".join(f"{name} {float(mean.min()):.3g} to {float(mean.max()):.3g}" for name, mean in means.items())
        raise ValueError(f"frontier: expected ranges of KL that overlap; got {ranges}")
    return low, high


def _check_range(kl: Mapping[str, torch.Tensor], at: float) -> None:
    low, high = _shared_range(kl)
    if not low <= at <= high:
        names = " and ".join(kl)
        raise ValueError(f"frontier: kl: expected between {low:.4g} and {high:.4g}, which {names} span; got {at:.4g}")
