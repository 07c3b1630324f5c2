"""mirror_descent in plain PyTorch: the oracle. Equation numbers are those of README.md."""

from __future__ import annotations

import torch

from .op import MirrorDescentInputs


def mirror_descent(inputs: MirrorDescentInputs) -> torch.Tensor:
    log_policy, preference, log_reference, tau, step_sizes, opponent, log_opponent, _ = inputs
    log_policy = log_policy.log_softmax(-1)
    for step in step_sizes:
        b = (step * tau).reshape(-1, 1)  # (G, 1) or (1, 1)
        weighted = torch.where(b == 1, 0, (1 - b) * log_policy) + torch.where(b == 0, 0, b * log_reference)  # 0 * -inf
        mixture = weighted.log_softmax(-1)  # (2)
        played = mixture if opponent == "mixture" else log_policy if log_opponent is None else log_opponent
        rival = played.softmax(-1)
        expected = (preference @ rival.unsqueeze(-1)).squeeze(-1)  # (G, A): P(a > rival)
        log_policy = (mixture + step * expected).log_softmax(-1)  # (1)
    return log_policy
