"""Preferences with one parameter from a reward to pure cycles, and exact measures of how cyclic a preference is.

A game without cycles need not have a reward, and one without a reward need not have cycles, so there are two measures:
the observable share of triples that are cyclic, and the share of the log-odds that no reward explains.
"""

from __future__ import annotations

import torch

from .games import low_rank_game


def taste_game(quality: torch.Tensor, angle: torch.Tensor, cycling: float, strength: float) -> torch.Tensor:
    """Return the preferences of annotators that weigh a common quality against a cyclic component.

        log-odds that a is preferred to b = strength ((1 - cycling) (q_a - q_b) + cycling sin(phi_a - phi_b))

    With cycling 0 this is Bradley-Terry, with the rewards strength * quality. With cycling 1 every response is
    preferred to those at angles up to half a turn behind its own.

    Args:
        quality (..., A): reward of each response, common to all annotators.
        angle (..., A): phi, angle of each response in the cyclic component, in radians.
        cycling: weight of the cyclic component, in [0, 1].
        strength: scale of the log-odds; 0 makes every preference 1/2.

    Returns:
        The preference matrices, (..., A, A).
    """
    if not 0 <= cycling <= 1:
        raise ValueError(f"taste_game: cycling: expected a number in [0, 1]; got {cycling}")
    if not 0 <= strength < float("inf"):
        raise ValueError(f"taste_game: strength: expected a finite number of at least 0; got {strength}")
    rewarded, turning = strength * (1 - cycling), strength * cycling
    planes = [rewarded * quality, torch.ones_like(quality), turning * angle.sin(), angle.cos()]
    return low_rank_game(torch.stack(planes, -1))


def cyclic_triple_share(preference: torch.Tensor) -> torch.Tensor:
    """Return the share of cyclic triples among all triples of responses.

    Without ties, a triple that is not cyclic has one response preferred to both others, so the number of such triples
    is the sum of w (w - 1) / 2 over the responses, each preferred to w others (Kendall and Babington Smith, 1940).

    Args:
        preference (..., A, A): [a, b] = P(a > b), without ties between different responses; A at least 3.

    Returns:
        Shares in [0, 1], (...,).
    """
    actions = preference.shape[-1]
    if actions < 3:
        raise ValueError(f"cyclic_triple_share: preference: expected at least 3 responses; got {actions}")
    different = ~torch.eye(actions, dtype=torch.bool, device=preference.device)
    if bool(((preference == 0.5) & different).any()):
        raise ValueError("cyclic_triple_share: preference: expected no ties between different responses; got one")
    wins = (preference > 0.5).sum(-1).double()
    triples = actions * (actions - 1) * (actions - 2) / 6
    return 1 - (wins * (wins - 1) / 2).sum(-1) / triples


def unrewarded_share(preference: torch.Tensor) -> torch.Tensor:
    """Return the share of the squared log-odds that no reward explains: 0 for Bradley-Terry and only there, at most 1.

    The log-odds are the sum of reward differences, with the row means as rewards, and of a rest that is orthogonal to
    all reward differences (the Helmholtz-Hodge decomposition of a complete graph).

    Args:
        preference (..., A, A): [a, b] = P(a > b), in (0, 1).

    Returns:
        Shares in [0, 1], (...,); 0 where every preference is 1/2.
    """
    odds = preference.logit()
    reward = odds.mean(-1)
    rest = odds - (reward.unsqueeze(-1) - reward.unsqueeze(-2))
    whole = odds.square().sum((-2, -1))
    return torch.where(whole > 0, rest.square().sum((-2, -1)) / whole.clamp_min(torch.finfo(odds.dtype).tiny), 0.0)
