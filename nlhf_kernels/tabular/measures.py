"""How far a policy is from the regularised Nash equilibrium pi*_tau of its game.

P_tau(p > q) = p^T P q - tau KL(p, mu) + tau KL(q, mu) has one equilibrium; all policies here are log-probabilities
(G, A), all results float64 where the inputs are.
"""

from __future__ import annotations

import torch


def kl_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p, q) of each game, (G,). An action of probability 0 under p adds nothing."""
    terms = log_p.exp() * (log_p - log_q)
    return torch.where(log_p == -torch.inf, 0.0, terms).sum(-1)


def exploitability(
    log_policy: torch.Tensor, preference: torch.Tensor, log_reference: torch.Tensor, tau: float
) -> torch.Tensor:
    """max over p of P_tau(p > pi), minus 1/2: zero at the equilibrium only, (G,).

    The best response is log p = log mu + P pi / tau + const, and its value tau log sum_a mu(a) exp(P(a > pi) / tau).
    """
    if not tau > 0:
        raise ValueError(f"exploitability: tau: expected a number above 0; got {tau}")
    expected = (preference @ log_policy.exp().unsqueeze(-1)).squeeze(-1)
    best = tau * torch.logsumexp(log_reference + expected / tau, -1)
    return best + tau * kl_divergence(log_policy, log_reference) - 0.5
