"""What RLHF, IPO and DPO answer in a tabular world, for contrast: all of them in closed form or by convex descent."""

from __future__ import annotations

import torch

from .game import PreferenceGame


def bradley_terry_fit(
    preference: torch.Tensor, sampling: torch.Tensor, *, iterations: int = 100, tolerance: float = 1e-13
) -> torch.Tensor:
    """The rewards (A,), of mean 0, that explain a preference matrix (A, A) best to a reward model.

    Maximises E_{a, b ~ sampling} P(a > b) log sigmoid(r_a - r_b), by Newton steps. The answer depends on `sampling`
    (A,) unless the preference is a Bradley-Terry one: that is what NLHF does not suffer from.
    """
    weights = sampling.unsqueeze(-1) * sampling.unsqueeze(-2)
    rewards = torch.zeros_like(sampling)
    for _ in range(iterations):
        chance = torch.sigmoid(rewards.unsqueeze(-1) - rewards.unsqueeze(-2))
        gradient = (weights * (preference - chance)).sum(-1)
        curvature = weights * chance * (1 - chance)
        laplacian = torch.diag(curvature.sum(-1)) - curvature
        step = _solve_up_to_a_constant(laplacian, gradient)
        step = step - step.mean()
        rewards = rewards + step / max(1.0, float(step.abs().max()))
        if float(step.abs().max()) < tolerance:
            break
    return rewards - rewards.mean()


def rlhf(game: PreferenceGame, sampling: torch.Tensor) -> torch.Tensor:
    """A reward fitted under `sampling`, then its regularised optimum: log pi = log reference + r / tau + const."""
    if game.preference.ndim != 2:
        raise ValueError(f"rlhf: game: expected one game (A, A); got {tuple(game.preference.shape)}")
    rewards = bradley_terry_fit(game.preference, sampling.to(game.preference))
    return (game.log_reference + rewards / game.tau).log_softmax(-1)


def ipo(wins: torch.Tensor, log_reference: torch.Tensor, tau: float) -> torch.Tensor:
    """The policy that minimises sum wins[a, b] (h(a, b) - 1 / (2 tau))^2: least squares on the graph of comparisons."""
    wins = wins.to(log_reference)
    pairs = wins + wins.mT
    laplacian = torch.diag(pairs.sum(-1)) - pairs
    target = (wins.sum(-1) - wins.sum(-2)) / (2 * tau)
    return (log_reference + _solve_up_to_a_constant(laplacian, target)).log_softmax(-1)


def _solve_up_to_a_constant(laplacian: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """x with laplacian x = target, whose null space is the constant vector: adding its projector makes it regular."""
    solution: torch.Tensor = torch.linalg.lstsq(laplacian + 1 / len(target), target.unsqueeze(-1)).solution
    return solution.squeeze(-1)


def dpo(
    wins: torch.Tensor, log_reference: torch.Tensor, tau: float, *, steps: int = 1000, step: float = 1.0
) -> torch.Tensor:
    """Gradient descent on -sum wins[a, b] log sigmoid(tau h(a, b)), its step divided by tau^2, so that tau h moves at
    one speed. Where an action always wins there is no minimum: the policy runs off to it, whatever tau, and `steps`
    says how far."""
    wins = wins.to(log_reference)
    ratios = torch.zeros_like(log_reference)
    for _ in range(steps):
        margin = ratios.unsqueeze(-1) - ratios.unsqueeze(-2)
        force = wins * torch.sigmoid(-tau * margin)
        ratios = ratios + step * (force.sum(-1) - force.sum(-2)) / tau
    return (log_reference + ratios).log_softmax(-1)
