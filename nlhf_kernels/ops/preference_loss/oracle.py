"""The oracle: each loss of the family from its equation, pair by pair (README.md, section 1)."""

from __future__ import annotations

import torch


def preference_loss(
    first: torch.Tensor,  # (B,) log pi(y) / mu(y)
    second: torch.Tensor,  # (B,) log pi(y') / mu(y')
    preference: torch.Tensor,  # (B,) P(y > y')
    *,
    tau: float,
    kind: str = "ipo",
) -> torch.Tensor:  # ()
    total = first.new_zeros(())
    for one, other, p in zip(first, second, preference, strict=True):
        h = one - other
        if kind == "ipo":
            total = total + p * (h - 1 / (2 * tau)) ** 2 + (1 - p) * (h + 1 / (2 * tau)) ** 2
        else:
            total = total + p * torch.log1p(torch.exp(-tau * h)) + (1 - p) * torch.log1p(torch.exp(tau * h))
    return total / max(first.numel(), 1)
