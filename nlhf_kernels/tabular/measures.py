"""Measures of a policy in its game: KL, best response, exploitability, win rates. Policies are log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .game import PreferenceGame


def kl_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Return KL(p, q) of each game, (...,); an action of probability 0 under p adds 0.

    Args:
        log_p, log_q (tensors (..., A)): log-probabilities.
    """
    terms = log_p.exp() * (log_p - log_q)
    return torch.where(log_p == -torch.inf, 0.0, terms).sum(-1)


def best_response(log_policy: torch.Tensor, game: PreferenceGame) -> torch.Tensor:
    """Return argmax over p of P_tau(p > policy): log p = log reference + P(. > policy) / tau + const, (..., A).

    Args:
        log_policy (tensor (..., A)): log-probabilities.
        game (PreferenceGame): the game.
    """
    return (game.log_reference + game.expected(log_policy) / game.tau).log_softmax(-1)


def exploitability(log_policy: torch.Tensor, game: PreferenceGame) -> torch.Tensor:
    """Return max over p of P_tau(p > policy), minus 1/2, (...,): zero at the equilibrium only.

    The best response's value is tau log sum_a reference(a) exp(P(a > policy) / tau).

    Args:
        log_policy (tensor (..., A)): log-probabilities.
        game (PreferenceGame): the game.
    """
    best = game.tau * torch.logsumexp(game.log_reference + game.expected(log_policy) / game.tau, -1)
    return best + game.tau * kl_divergence(log_policy, game.log_reference) - 0.5


def span(log_policy: torch.Tensor) -> torch.Tensor:
    """Return the largest minus the smallest log-probability, (...,), which bounds the log-ratios in the theorems.

    Args:
        log_policy (tensor (..., A)): log-probabilities.
    """
    return log_policy.max(-1).values - log_policy.min(-1).values


def win_rates(log_policies: Sequence[torch.Tensor], game: PreferenceGame) -> torch.Tensor:
    """Return the probabilities that policy i is preferred to policy j, (N, N, ...), without regularisation.

    Args:
        log_policies (sequence of N tensors (..., A)): log-probabilities.
        game (PreferenceGame): the game.
    """
    policies = [log_policy.exp() for log_policy in log_policies]
    rows = [torch.stack([(p * game.expected(q.log())).sum(-1) for q in policies]) for p in policies]
    return torch.stack(rows)
