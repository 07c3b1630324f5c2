"""Preference matrices (..., A, A), [a, b] = P(a > b), P + P^T = 1: random, Bradley-Terry, cyclic, and from counts."""

from __future__ import annotations

import torch

from ..core.checks import check_number


def random_games(games: int, actions: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Sample independent games (G, A, A), the lower triangle uniform in [0, 1].

    Args:
        games (int): how many, G.
        actions (int): of each, A.
        seed (int): of the random numbers.
        dtype (torch.dtype): of the result.
    """
    generator = torch.Generator().manual_seed(seed)
    lower = torch.rand(games, actions, actions, generator=generator, dtype=dtype, device="cpu").tril(-1)
    upper = (1 - lower.mT).triu(1)
    return lower + upper + 0.5 * torch.eye(actions, dtype=dtype, device="cpu")


def bradley_terry_game(rewards: torch.Tensor) -> torch.Tensor:
    """Return P(a > b) = sigmoid(r_a - r_b), the preferences that a reward model can express.

    Args:
        rewards (tensor (..., A)): one for each action.
    """
    return torch.sigmoid(rewards.unsqueeze(-1) - rewards.unsqueeze(-2))


def low_rank_game(embeddings: torch.Tensor) -> torch.Tensor:
    """Return preferences of even rank, P(a > b) = sigmoid(x_a^T J x_b) with J skew-symmetric.

    Each pair of coordinates is a plane in which preference is cyclic; in Bradley-Terry preferences all coordinates but
    one are constant.

    Args:
        embeddings (tensor (..., A, 2 R)): one vector for each action.
    """
    if embeddings.shape[-1] % 2:
        raise ValueError(f"low_rank_game: embeddings: expected an even last dimension; got {embeddings.shape[-1]}")
    first, second = embeddings[..., 0::2], embeddings[..., 1::2]
    product = first @ second.mT
    return torch.sigmoid(product - product.mT)


def cyclic_game(win: float = 1.0, *, actions: int = 3, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return rock, paper, scissors (1, A, A): each action is preferred to the half of the others that comes after it.

    Args:
        win (float): probability of each of these preferences, in [0.5, 1].
        actions (int): odd, at least 3.
        dtype (torch.dtype): of the result.
    """
    if not 0.5 <= win <= 1:
        raise ValueError(f"cyclic_game: win: expected a probability in [0.5, 1]; got {win}")
    if actions < 3 or actions % 2 == 0:
        raise ValueError(f"cyclic_game: actions: expected an odd number from 3; got {actions}")
    action = torch.arange(actions, dtype=torch.int64, device="cpu")
    ahead = (action[None, :] - action[:, None]) % actions  # how far b comes after a
    wins = torch.full((actions, actions), 1 - win, dtype=dtype, device="cpu").masked_fill_(ahead <= actions // 2, win)
    return wins.fill_diagonal_(0.5).unsqueeze(0)


def dice_game(*, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return the game (1, 3, 3) of the dice {2, 4, 9}, {1, 6, 8}, {3, 5, 7}: each beats the next with probability 5/9.

    Args:
        dtype (torch.dtype): of the result.
    """
    return cyclic_game(5 / 9, dtype=dtype)


def diversity_game(epsilon: float = 0.0, *, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return three actions whose Nash equilibrium, without regularisation, is (1/3 + e/2, 1/3 + e/2, 1/3 - e).

    The equilibrium is continuous in e, while the best action under a Bradley-Terry fit jumps between the first and the
    second as e changes sign: the equilibrium preserves a diversity that a reward model loses.

    Args:
        epsilon (float): e, in [-1/3, 1/3].
        dtype (torch.dtype): of the result, (1, 3, 3).
    """
    if not abs(epsilon) <= 1 / 3:
        raise ValueError(f"diversity_game: epsilon: expected a number in [-1/3, 1/3]; got {epsilon}")
    second, third, third_second = 2 / 3 - epsilon / 2, 1 / 3 - epsilon / 4, 2 / 3 + epsilon / 4
    rows = [[0.5, 1 - second, 1 - third], [second, 0.5, 1 - third_second], [third, third_second, 0.5]]
    return torch.tensor([rows], dtype=dtype, device="cpu")


def game_from_counts(wins: torch.Tensor, smoothing: float = 1.0) -> torch.Tensor:
    """Estimate a preference (..., A, A) from counts of comparisons.

    Args:
        wins (tensor (..., A, A)): [a, b] = number of times a was preferred to b.
        smoothing (float): comparisons added to each pair, half of them won; a pair never compared is then 1/2.
    """
    if not isinstance(wins, torch.Tensor):
        raise TypeError(f"game_from_counts: wins: expected a tensor; got {type(wins).__name__}")
    wins = wins.to(torch.float64)
    if wins.ndim < 2 or wins.shape[-1] != wins.shape[-2]:
        raise ValueError(f"game_from_counts: wins: expected shape (..., A, A); got {tuple(wins.shape)}")
    if not (counts := (wins >= 0) & wins.isfinite()).all():
        raise ValueError(f"game_from_counts: wins: expected counts of at least 0; got {float(wins[~counts][0]):g}")
    check_number("game_from_counts", "smoothing", smoothing, 0.0, open_low=True)
    preference = (wins + smoothing / 2) / (wins + wins.mT + smoothing)
    preference.diagonal(dim1=-2, dim2=-1).fill_(0.5)
    return preference
