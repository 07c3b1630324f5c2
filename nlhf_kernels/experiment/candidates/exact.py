"""The limit of each contestant for infinitely many votes and updates: tabular solutions of the same games."""

from __future__ import annotations

import torch

from ...tabular import PreferenceGame, at_budget, equilibrium
from ...tabular.measures import best_response
from .judges import fit_rewards
from .learners import Setting, centred
from .presets import CONTESTANTS

TOLERANCE = 1e-7  # of log-probabilities
TAUS = tuple(10 ** (-step / 8) for step in range(25))  # 1 to 0.001, on whose path the budget's equilibrium is found
WEIGHT = 1e7  # total comparisons, instead of infinitely many: the fit's prior is negligible beside them


def exact_policies(contestant: str, setting: Setting) -> torch.Tensor | None:
    """Return the limits of a contestant over its grid of taus, (N, M, A) log-probabilities.

    RLHF's reward is the Bradley-Terry fit to pairs of the reference's answers. Nash-MD and IPO-MD converge to the
    policy whose mixture with the reference is the equilibrium at tau / (1 - beta); self-play and Nash-EMA to the
    equilibrium; best response to the best response to the reference. None for RLHF with votes during training: its
    reward depends on the answers of all its past policies, and its limit is not known.

    Args:
        contestant: a key of CONTESTANTS.
        setting: world, reference and grids.
    """
    chosen, preset = CONTESTANTS[contestant], setting.preset
    preference, log_reference = setting.world.preference, setting.log_reference
    if chosen.algorithm == "rlhf":
        if chosen.information != "pairs":
            return None
        rewards = exact_rewards(preference, log_reference)
        return torch.stack([(log_reference + rewards / tau).log_softmax(-1) for tau in preset.reward_taus])
    policies = []
    for tau in preset.taus:
        beta = chosen.beta or 0.0
        game = PreferenceGame(preference, log_reference.exp(), tau / (1 - beta))
        if chosen.algorithm == "best-response":
            policies.append(best_response(log_reference, game))
        else:
            mixture = equilibrium(game, tolerance=TOLERANCE)
            policies.append(((mixture - beta * log_reference) / (1 - beta)).log_softmax(-1))
    return torch.stack(policies)


def equilibrium_within(setting: Setting) -> torch.Tensor:
    """Return the equilibrium of the game in which both sides have the preset's KL budget, (M, A) log-probabilities.

    It is the regularised equilibrium at the tau at which its KL is the budget, as tau is then the price of a nat; or,
    where the KL stays below the budget at every tau, its limit for tau -> 0.

    Args:
        setting: world, reference and budget.
    """
    reference = setting.log_reference.exp()
    games = [PreferenceGame(setting.world.preference, reference, tau) for tau in TAUS]
    path = torch.stack([equilibrium(game, tolerance=TOLERANCE) for game in games])
    return at_budget(path, setting.log_reference, setting.preset.budget)


def exact_rewards(preference: torch.Tensor, log_reference: torch.Tensor) -> torch.Tensor:
    """Fit Bradley-Terry rewards (M, A) to the preferences between the reference's answers.

    Args:
        preference (M, A, A): [a, b] = P(a > b).
        log_reference (M, A): the policy of the compared answers. Answers that are no candidate are left out, as in the
            sample of human pairs, and get the worst candidate's reward less 1.
    """
    chance = log_reference[:, :-1].softmax(-1)
    wins = WEIGHT * chance.unsqueeze(-1) * chance.unsqueeze(-2) * preference[:, :-1, :-1]
    rewards = fit_rewards(wins, torch.zeros_like(chance), steps=100)
    return centred(rewards, log_reference)
