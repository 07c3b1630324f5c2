"""Baselines: the policies of RLHF, IPO and DPO in a tabular game, in closed form or by convex descent."""

from __future__ import annotations

import torch

from .game import PreferenceGame


def bradley_terry_fit(
    preference: torch.Tensor, sampling: torch.Tensor, *, iterations: int = 100, tolerance: float = 1e-13
) -> torch.Tensor:
    """Fit Bradley-Terry rewards (A,), of mean 0, to a preference matrix.

    Newton steps on E_{a, b ~ sampling} P(a > b) log sigmoid(r_a - r_b). The optimum depends on `sampling` unless the
    preference is a Bradley-Terry one; the Nash equilibrium does not.

    Args:
        preference (tensor (A, A)): [a, b] = P(a > b).
        sampling (tensor (A,)): probabilities with which the compared actions are sampled.
        iterations (int): Newton steps, at most.
        tolerance (float): a step whose largest entry is below it is the last.
    """
    weights = sampling.unsqueeze(-1) * sampling.unsqueeze(-2)
    rewards = torch.zeros_like(sampling)
    for _ in range(iterations):
        fitted = torch.sigmoid(rewards.unsqueeze(-1) - rewards.unsqueeze(-2))
        gradient = (weights * (preference - fitted)).sum(-1)
        curvature = weights * fitted * (1 - fitted)
        laplacian = torch.diag(curvature.sum(-1)) - curvature
        step = _solve_up_to_a_constant(laplacian, gradient)
        step = step - step.mean()
        rewards = rewards + step / max(1.0, float(step.abs().max()))
        if float(step.abs().max()) < tolerance:
            break
    return rewards - rewards.mean()


def rlhf(game: PreferenceGame, sampling: torch.Tensor) -> torch.Tensor:
    """Return the log-policy (A,) of RLHF: fit rewards, then log pi = log reference + r / tau + const.

    Args:
        game (PreferenceGame): one game, preference (A, A).
        sampling (tensor (A,)): probabilities of the actions that the reward model is fitted on.
    """
    if game.preference.ndim != 2:
        raise ValueError(f"rlhf: game: expected one game (A, A); got {tuple(game.preference.shape)}")
    rewards = bradley_terry_fit(game.preference, sampling.to(game.preference))
    return (game.log_reference + rewards / game.tau).log_softmax(-1)


def ipo(wins: torch.Tensor, log_reference: torch.Tensor, tau: float) -> torch.Tensor:
    """Return the log-policy (A,) that minimises sum wins[a, b] (h(a, b) - 1 / (2 tau))^2, by least squares.

    Args:
        wins (tensor (A, A)): [a, b] = number of times a was preferred to b.
        log_reference (tensor (A,)): log-probabilities of the reference.
        tau (float): strength of the regularisation.
    """
    wins = wins.to(log_reference)
    pairs = wins + wins.mT
    laplacian = torch.diag(pairs.sum(-1)) - pairs
    target = (wins.sum(-1) - wins.sum(-2)) / (2 * tau)
    return (log_reference + _solve_up_to_a_constant(laplacian, target)).log_softmax(-1)


def _solve_up_to_a_constant(laplacian: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Solve laplacian x = target; adding the projector on the null space (constant vectors) makes it regular."""
    solution: torch.Tensor = torch.linalg.lstsq(laplacian + 1 / len(target), target.unsqueeze(-1)).solution
    return solution.squeeze(-1)


def dpo(
    wins: torch.Tensor, log_reference: torch.Tensor, tau: float, *, steps: int = 1000, step: float = 1.0
) -> torch.Tensor:
    """Return the log-policy (A,) after gradient descent on -sum wins[a, b] log sigmoid(tau h(a, b)).

    If an action always wins there is no minimum: for every tau the policy diverges towards that action, and `steps`
    determines how far.

    Args:
        wins (tensor (A, A)): [a, b] = number of times a was preferred to b.
        log_reference (tensor (A,)): log-probabilities of the reference.
        tau (float): strength of the regularisation.
        steps (int): of gradient descent.
        step (float): size of a step, divided by tau^2, so that tau h moves at the same speed for every tau.
    """
    wins = wins.to(log_reference)
    ratios = torch.zeros_like(log_reference)
    for _ in range(steps):
        margin = ratios.unsqueeze(-1) - ratios.unsqueeze(-2)
        force = wins * torch.sigmoid(-tau * margin)
        ratios = ratios + step * (force.sum(-1) - force.sum(-2)) / tau
    return (log_reference + ratios).log_softmax(-1)
