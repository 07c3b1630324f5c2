"""Preference matrices, (G, A, A), [g, a, b] = P(a > b), P + P^T = 1. They may be cyclic: that is the point."""

from __future__ import annotations

import torch


def random_games(games: int, actions: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Independent games, the lower triangle uniform in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    lower = torch.rand(games, actions, actions, generator=generator, dtype=dtype).tril(-1)
    upper = (1 - lower.mT).triu(1)
    return lower + upper + 0.5 * torch.eye(actions, dtype=dtype)


def cyclic_game(win: float = 1.0, *, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Rock, paper, scissors where the winner wins with probability `win`: each action beats the next."""
    if not 0.5 <= win <= 1:
        raise ValueError(f"cyclic_game: win: expected a probability in [0.5, 1]; got {win}")
    return torch.tensor([[[0.5, win, 1 - win], [1 - win, 0.5, win], [win, 1 - win, 0.5]]], dtype=dtype)


def dice_game(*, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Three fair dice, {2, 4, 9}, {1, 6, 8} and {3, 5, 7}: each beats the next with probability 5/9."""
    return cyclic_game(5 / 9, dtype=dtype)
