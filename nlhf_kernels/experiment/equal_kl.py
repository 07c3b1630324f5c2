"""Win rates of contestants at one KL from the reference, the level: a contestant has a policy for every tau, and its
frontier begins at the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..evaluation import Estimate, Frontier, FrontierPoint, Tournament, rate_at_equal_kl
from ..evaluation.tournament import beating_in_turn, rate_matrix


@dataclass(frozen=True)
class EqualKL:
    """Compare contestants at one KL: the budget, or less where one of them stays below it with all of its policies.

    Args:
        tournament (Tournament): of the reference and all policies.
        kl (mapping name -> tensor (S, P)): KL from the reference of each of them (`kl_values`).
        frontiers (mapping contestant -> sequence of names): its policies, one for each tau.
        reference (str): name of the reference.
        budget (float): nats.
    """

    tournament: Tournament
    kl: Mapping[str, torch.Tensor]
    frontiers: Mapping[str, Sequence[str]]
    reference: str
    budget: float

    @property
    def names(self) -> list[str]:
        """The reference and the contestants."""
        return [self.reference, *self.frontiers]

    @cached_property
    def level(self) -> float:
        """The KL of the comparison, nats."""
        reached = [max(self._mean_kl(name) for name in self._policies(contestant)) for contestant in self.frontiers]
        return min(self.budget, *reached)

    def rate(self, first: str, second: str, comparisons: int = 1) -> Estimate:
        """Return P(first > second) at the level, with the interval of KLs and win rates together.

        Args:
            first, second (str): two of `names`.
            comparisons (int): number of win rates from which the best is picked, for which the interval is widened.
        """
        sides = self._policies(first), self._policies(second)
        return rate_at_equal_kl(self.tournament, *sides, self.kl, self.level, comparisons)

    def on(self, prompts: Sequence[int]) -> EqualKL:
        """Return the comparison on some of the prompts, at equal KL on these.

        Args:
            prompts (sequence of int): their indices, two or more.
        """
        chosen = list(prompts)
        values = {match: each[:, chosen] for match, each in self.tournament.values.items()}
        kl = {name: each[:, chosen] for name, each in self.kl.items()}
        return EqualKL(Tournament(self.tournament.names, values), kl, self.frontiers, self.reference, self.budget)

    @cached_property
    def matrix(self) -> list[list[dict[str, Any] | None]]:
        """Win rates of row against column, as dicts; None on the diagonal."""
        return rate_matrix(self.names, self.rate)

    def cycles(self) -> list[list[str]]:
        """Return triples of `names` of which each beats the next, by the means."""
        rates = dict(zip(self.names, self.matrix, strict=True))

        def mean(first: str, second: str) -> float:
            cell = rates[first][self.names.index(second)]
            return 0.5 if cell is None else float(cell["mean"])

        return beating_in_turn(self.names, mean)

    def nearest(self, contestant: str) -> int:
        """Return the index of the contestant's policy whose KL is nearest to the level.

        Args:
            contestant (str): of `frontiers`.
        """
        distances = [abs(self._mean_kl(name) - self.level) for name in self.frontiers[contestant]]
        return distances.index(min(distances))

    def points(self, contestant: str, taus: Sequence[float]) -> list[FrontierPoint]:
        """Return the KL and the win rate against the reference of each of the contestant's policies.

        Args:
            contestant (str): of `frontiers`.
            taus (sequence of float): of its policies.
        """
        names = self._policies(contestant)
        rates = torch.stack([self.tournament.match(name, self.reference) for name in names])
        kl = torch.stack([self.kl[name].expand(rates.shape[1:]) for name in names])
        return Frontier(contestant, [float("inf"), *taus], kl, rates).points()

    def _policies(self, name: str) -> list[str]:
        return [self.reference, *self.frontiers.get(name, [])]

    def _mean_kl(self, policy: str) -> float:
        return float(self.kl[policy].double().mean())
