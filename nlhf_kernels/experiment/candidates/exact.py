"""What each contestant would become with infinitely many votes and updates: tabular solutions of the same games."""

from __future__ import annotations

import torch

from ...tabular import PreferenceGame, equilibrium
from ...tabular.measures import best_response
from .learners import Setting, centred
from .presets import CONTESTANTS
from .tellers import fit_rewards

TOLERANCE = 1e-7  # of log-probabilities
WEIGHT = 1e7  # comparisons in all that stand for infinitely many: the pull to 0 of the fit vanishes beside them


def exact_policies(contestant: str, setting: Setting) -> torch.Tensor | None:
    """The limits of a contestant over its grid of taus, (N, M, A) log-probabilities.

    RLHF's reward is the Bradley-Terry fit to pairs of the reference's answers. Nash-MD and IPO-MD stop where their
    mixture with the reference is the equilibrium at tau / (1 - beta); self-play and Nash-EMA at the equilibrium; best
    response at the best response to the reference. None for RLHF with votes during training: its reward follows its own
    policy's answers through time, and has no limit that is known.

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


def exact_rewards(preference: torch.Tensor, log_reference: torch.Tensor) -> torch.Tensor:
    """Bradley-Terry rewards (M, A) that explain the preferences between the reference's answers best.

    Args:
        preference (M, A, A): [a, b] = P(a > b).
        log_reference (M, A): whose answers are compared. Anything else than a candidate is left out, as in the sample
            of human pairs, and gets the worst candidate's reward less 1.
    """
    chance = log_reference[:, :-1].softmax(-1)
    wins = WEIGHT * chance.unsqueeze(-1) * chance.unsqueeze(-2) * preference[:, :-1, :-1]
    rewards = fit_rewards(wins, torch.zeros_like(chance), steps=100)
    return centred(rewards, log_reference)
