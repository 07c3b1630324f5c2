"""What each token's log-probability is multiplied with: the advantage, less the price of leaving the reference.

README.md, section 1, derives the modes and says which of them are unbiased.
"""

from __future__ import annotations

import torch

from ..logprobs.layout import Output
from .sequences import Sequences

KL_MODES = ("sequence", "to_go", "exact", "token")


def token_weights(
    mode: str,
    tau: float,
    advantage: torch.Tensor,  # (B,)
    values: torch.Tensor,  # (5, N) rows of layout.Output; 0 where ignored
    sequences: Sequences,
) -> torch.Tensor:  # (N,) float64
    log_ratio = values[Output.POLICY].double() - values[Output.REFERENCE].double()
    of_token = sequences.of_token
    if mode == "sequence":
        price = sequences.sums(log_ratio)[of_token]  # equation 2
    elif mode == "to_go":
        price = sequences.sums_from(log_ratio)  # equation 3
    elif mode == "exact":
        kl = values[Output.KL].double()
        price = sequences.sums_from(kl) - kl  # equation 4: of later tokens; its own is differentiated
    else:
        price = log_ratio  # equation 6
    return advantage.double()[of_token] - (tau * price if tau else 0)


def surrogate(
    mode: str,
    tau: float,
    weights: torch.Tensor,  # (N,) float64
    policy_logprobs: torch.Tensor,  # (N,)
    kl: torch.Tensor | None,  # (N,), for "exact"
) -> torch.Tensor:  # () float64
    """Return the loss whose gradient is minus the policy gradient, summed over sequences."""
    total = -(weights * policy_logprobs).sum()
    if mode == "exact" and tau:
        assert kl is not None, "mode exact computes it"
        total = total + tau * kl.double().sum()
    return total
