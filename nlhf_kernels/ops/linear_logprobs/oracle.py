"""The oracle: both models' logits, stored whole, through the oracle of logprobs."""

from __future__ import annotations

import torch

from ..logprobs.layout import LogprobsInputs, Settings, Transform
from ..logprobs.oracle import logprobs
from .head import Head


def linear_logprobs(
    hidden: torch.Tensor,  # (N, D)
    head: Head,
    targets: torch.Tensor,  # (N,)
    reference_hidden: torch.Tensor | None = None,  # (N, D')
    reference_head: Head | None = None,
    *,
    beta: torch.Tensor | None = None,  # () or (N,)
    temperature: float = 1.0,
    extras: int = 0,
) -> torch.Tensor:  # (5, N), rows as in layout.Output
    reference, transform = None, Transform()
    if reference_hidden is not None:
        other = reference_head or head
        reference, transform = products(reference_hidden, other), other.transform
    settings = Settings(temperature, head.transform, transform, extras)
    values, _ = logprobs(LogprobsInputs(products(hidden, head), reference, targets, beta, settings, "torch"))
    return values


def products(hidden: torch.Tensor, head: Head) -> torch.Tensor:  # (N, V)
    return torch.nn.functional.linear(hidden, head.weight, head.bias)
