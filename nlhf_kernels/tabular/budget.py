"""Policies compared at equal distance from the reference: every policy and every opponent has the same KL budget.

A regularised game penalises the distance, so two algorithms at one tau may end at very different distances from the
reference, and a higher win rate may be due to the larger distance alone. Here the distance is fixed, game by game.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .measures import kl_divergence

HALVINGS = 60  # of an interval: float64 has 52 digits


def best_within(values: torch.Tensor, log_reference: torch.Tensor, budget: float) -> torch.Tensor:
    """Return the policy of the largest expected value among those with KL(policy, reference) <= budget.

    Args:
        values (..., A): value of each action.
        log_reference (..., A): log-probabilities, finite.
        budget: nats, above 0.

    Returns:
        Log-probabilities (..., A): log reference + values / tau + const, with tau such that the KL is the budget, or so
        small that only the best actions have probability.
    """
    _check_budget(budget)
    scale = (values.amax(-1) - values.amin(-1)).clamp_min(1e-12).unsqueeze(-1)

    def tilted(log_price: torch.Tensor) -> torch.Tensor:
        return (log_reference + values / (scale * log_price.exp())).log_softmax(-1)

    low = torch.full_like(scale, -10.0)  # prices e^-10 to e^10 of the values' range
    return tilted(_last_within(tilted, low, torch.full_like(scale, 10.0), log_reference, budget))


def exploitability_within(
    log_policy: torch.Tensor, preference: torch.Tensor, log_reference: torch.Tensor, budget: float
) -> torch.Tensor:
    """Return max P(p > policy) - 1/2 over the policies p with KL(p, reference) <= budget.

    For a policy within the budget this is at least 0, and 0 only at the equilibrium of the game in which both sides
    have that budget.

    Args:
        log_policy (..., A): log-probabilities.
        preference (..., A, A): [a, b] = P(a > b).
        log_reference (..., A): log-probabilities, finite.
        budget: nats, above 0.

    Returns:
        Win rates less 1/2, (...,).
    """
    values = (preference @ log_policy.exp().unsqueeze(-1)).squeeze(-1)
    return (best_within(values, log_reference, budget).exp() * values).sum(-1) - 0.5


def at_budget(log_policies: torch.Tensor, log_reference: torch.Tensor, budget: float) -> torch.Tensor:
    """Return the policy of a frontier whose KL is the budget.

    The frontier is the path from the reference through the policies in their order, linear in log-probabilities (the
    geometric mixtures of neighbours). The result is its first point at which the KL exceeds the budget, or the last
    policy if the whole path is within the budget.

    Args:
        log_policies (N, ..., A): in the order of a falling tau.
        log_reference (..., A): log-probabilities, finite.
        budget: nats, above 0.

    Returns:
        Log-probabilities, (..., A).
    """
    _check_budget(budget)
    nodes = torch.cat([log_reference.expand_as(log_policies[0]).unsqueeze(0), log_policies])
    beyond = kl_divergence(nodes, log_reference) > budget  # (N + 1, ...); never at the reference
    leaves = beyond.int().argmax(0) - 1  # the last node before the first beyond the budget
    leaves = torch.where(beyond.any(0), leaves, len(log_policies) - 1)
    index = leaves.unsqueeze(0).unsqueeze(-1).expand(1, *nodes.shape[1:])
    start, end = nodes.gather(0, index).squeeze(0), nodes.gather(0, index + 1).squeeze(0)

    def between(share: torch.Tensor) -> torch.Tensor:
        return torch.lerp(end, start, share).log_softmax(-1)

    share = _last_within(between, torch.zeros_like(start[..., :1]), torch.ones_like(start[..., :1]),
                         log_reference, budget)  # fmt: skip
    return between(share)


def _last_within(
    policy: Callable[[torch.Tensor], torch.Tensor],
    low: torch.Tensor,  # (..., 1): the end that may be beyond the budget
    high: torch.Tensor,  # (..., 1): the end that is within it
    log_reference: torch.Tensor,
    budget: float,
) -> torch.Tensor:
    """Return the x closest to `low` for which policy(x) is within the budget, by bisection."""
    free = (kl_divergence(policy(low), log_reference) <= budget).unsqueeze(-1)
    bottom = low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        within = (kl_divergence(policy(middle), log_reference) <= budget).unsqueeze(-1)
        low, high = torch.where(within, low, middle), torch.where(within, middle, high)
    return torch.where(free, bottom, high)


def _check_budget(budget: float) -> None:
    if not 0 < budget < float("inf"):
        raise ValueError(f"budget: expected a finite number of nats above 0; got {budget}")
