"""Rewards: callables (prompts, responses) -> one number a row, and the check of what they return. Judges have theirs in
`preference`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..core.stopping import Stopped

Reward = Callable[[Sequence[str], Sequence[str]], Any]


def rewards(reward: Reward, prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
    """Return a reward's (B,) float64 values on the CPU; raise where they are not B finite numbers.

    Args:
        reward: the callable.
        prompts, responses: B texts each.
    """
    name = getattr(reward, "__qualname__", type(reward).__name__)
    try:
        returned = reward(list(prompts), list(responses))
    except Stopped:
        raise
    except SystemExit as stop:  # it would look like the end of a finished run
        raise RuntimeError(f"NashTrainer: reward: {name}: called sys.exit({stop.code!r})") from stop
    try:
        values = torch.as_tensor(returned, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"NashTrainer: reward: {name}: expected {len(prompts)} numbers; got {type(returned).__name__}: {error}"
        ) from error
    if values.shape != (len(prompts),):
        raise ValueError(
            f"NashTrainer: reward: {name}: expected {len(prompts)} numbers; got shape {tuple(values.shape)}"
        )
    wrong = (~values.isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"NashTrainer: reward: {name}: expected finite numbers; got {float(values[wrong[0]])} in rows {wrong[:5]}"
        )
    return values
