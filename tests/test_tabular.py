"""Games and measures against what is known about them."""

from __future__ import annotations

import pytest
import torch

from nlhf_kernels.tabular import cyclic_game, dice_game, exploitability, kl_divergence, random_games


@pytest.mark.parametrize("game", [random_games(5, 7), cyclic_game(), cyclic_game(0.8), dice_game()])
def test_games_are_preferences(game) -> None:
    assert torch.allclose(game + game.mT, torch.ones_like(game), atol=1e-15)
    assert ((game >= 0) & (game <= 1)).all()


def test_dice_beat_each_other_in_a_cycle() -> None:
    dice = torch.tensor([[2, 4, 9], [1, 6, 8], [3, 5, 7]])
    wins = (dice[:, None, :, None] > dice[None, :, None, :]).double().mean((-1, -2))
    expected = wins + 0.5 * torch.eye(3, dtype=torch.float64) - torch.diag(torch.diag(wins))
    torch.testing.assert_close(dice_game()[0], expected)


def test_random_games_are_fixed_by_their_seed() -> None:
    assert torch.equal(random_games(2, 4, seed=1), random_games(2, 4, seed=1))
    assert not torch.equal(random_games(2, 4, seed=1), random_games(2, 4, seed=2))


def test_cyclic_game_refuses_what_is_no_winner() -> None:
    with pytest.raises(ValueError, match=r"win: expected a probability in \[0.5, 1\]; got 0.3"):
        cyclic_game(0.3)


def test_kl_divergence_of_known_distributions() -> None:
    p, q = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
    torch.testing.assert_close(kl_divergence(p, q), torch.tensor([0.5]).log().neg() * 0.5)
    assert kl_divergence(p, p) == 0
    assert kl_divergence(q, p) == torch.inf


def test_exploitability_is_zero_at_the_equilibrium_only() -> None:
    """Uniform is the equilibrium of rock-paper-scissors with a uniform reference, by symmetry."""
    uniform = torch.zeros(1, 3, dtype=torch.float64).log_softmax(-1)
    other = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    assert exploitability(uniform, cyclic_game(), uniform, 0.1).abs() < 1e-15
    assert exploitability(other, cyclic_game(), uniform, 0.1) > 1e-3


def test_exploitability_is_the_best_of_all_responses() -> None:
    """Against a search over a grid of responses: none does better than the closed form, the best comes close."""
    tau, game = 0.3, cyclic_game(0.9)
    policy = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64)
    reference = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)
    grid = torch.cartesian_prod(*[torch.linspace(1e-6, 1, 101, dtype=torch.float64)] * 2)
    grid = torch.cat([grid, 1 - grid.sum(-1, keepdim=True)], -1)
    grid = grid[grid[:, 2] > 0]
    kl = lambda p: kl_divergence(p.log(), reference.log().expand_as(p))  # noqa: E731
    values = grid @ game[0] @ policy[0] - tau * kl(grid) + tau * kl(policy)
    gap = exploitability(policy.log(), game, reference.log(), tau)
    assert values.max() - 0.5 <= gap + 1e-12
    assert values.max() - 0.5 > gap - 1e-3
    with pytest.raises(ValueError, match="tau: expected a number above 0; got 0"):
        exploitability(policy.log(), game, reference.log(), 0)
