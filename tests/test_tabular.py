"""Games, measures and baselines against known results."""

from __future__ import annotations

import math

import pytest
import torch

from nlhf_kernels import tabular
from nlhf_kernels.tabular import PreferenceGame

F64 = torch.float64
GAMES = {
    "random": tabular.random_games(5, 7),
    "cyclic": tabular.cyclic_game(),
    "weak cycle of five": tabular.cyclic_game(0.8, actions=5),
    "dice": tabular.dice_game(),
    "diversity": tabular.diversity_game(0.2),
    "Bradley-Terry": tabular.bradley_terry_game(torch.randn(3, 6, dtype=F64)),
    "low rank": tabular.low_rank_game(torch.randn(2, 6, 4, dtype=F64)),
    "counts": tabular.game_from_counts(torch.randint(0, 20, (6, 6))),
}


def log(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=F64).log()


@pytest.mark.parametrize("name", GAMES)
def test_constructors_make_preferences(name) -> None:
    assert PreferenceGame(GAMES[name]).ok.all()


def test_dice_beat_each_other_in_a_cycle() -> None:
    dice = torch.tensor([[2, 4, 9], [1, 6, 8], [3, 5, 7]])
    wins = (dice[:, None, :, None] > dice[None, :, None, :]).double().mean((-1, -2)).fill_diagonal_(0.5)
    torch.testing.assert_close(tabular.dice_game()[0], wins)


def test_random_games_are_fixed_by_their_seed() -> None:
    assert torch.equal(tabular.random_games(2, 4, seed=1), tabular.random_games(2, 4, seed=1))
    assert not torch.equal(tabular.random_games(2, 4, seed=1), tabular.random_games(2, 4, seed=2))


def test_counts_are_smoothed_towards_a_half() -> None:
    game = tabular.game_from_counts(torch.tensor([[0, 9, 0], [1, 0, 0], [0, 0, 0]]), smoothing=2.0)
    torch.testing.assert_close(game[0], torch.tensor([0.5, 10 / 12, 0.5], dtype=F64))


def test_low_rank_game_can_be_a_cycle() -> None:
    angles = torch.arange(3, dtype=F64) * 2 * math.pi / 3
    game = tabular.low_rank_game(torch.stack([angles.cos(), angles.sin()], -1))
    assert game[0, 1] > 0.5
    assert game[1, 2] > 0.5
    assert game[2, 0] > 0.5


def test_kl_divergence_and_span_of_known_distributions() -> None:
    p, q = log(0.5, 0.5, 0.0), log(0.25, 0.5, 0.25)
    torch.testing.assert_close(tabular.kl_divergence(p, q), torch.tensor(0.5 * math.log(2), dtype=F64))
    assert tabular.kl_divergence(p, p) == 0
    assert tabular.kl_divergence(q, p) == torch.inf
    assert tabular.span(q) == pytest.approx(math.log(2))


def test_exploitability_is_the_best_of_all_responses() -> None:
    """In a grid search over responses, none exceeds the closed form and the best comes close."""
    game = PreferenceGame(tabular.cyclic_game(0.9)[0], torch.tensor([0.2, 0.5, 0.3], dtype=F64), tau=0.3)
    policy = log(0.6, 0.3, 0.1)
    grid = torch.cartesian_prod(*[torch.linspace(1e-6, 1, 101, dtype=F64)] * 2)
    grid = torch.cat([grid, 1 - grid.sum(-1, keepdim=True)], -1)
    grid = grid[grid[:, 2] > 0]
    kl = lambda log_p: tabular.kl_divergence(log_p, game.log_reference)  # noqa: E731
    values = grid @ game.expected(policy) - game.tau * kl(grid.log()) + game.tau * kl(policy)
    gap = tabular.exploitability(policy, game)
    assert gap - 1e-3 < values.max() - 0.5 <= gap + 1e-12
    answer = tabular.best_response(policy, game)
    value = answer.exp() @ game.expected(policy) - game.tau * kl(answer) + game.tau * kl(policy)
    torch.testing.assert_close(value - 0.5, gap)


def test_win_rates_of_pure_policies_are_the_matrix() -> None:
    game = PreferenceGame(tabular.diversity_game(0.1)[0])
    pure = list(torch.eye(3, dtype=F64).log())
    torch.testing.assert_close(tabular.win_rates(pure, game), game.preference)


def test_contexts_are_averaged_with_their_probabilities() -> None:
    rho = torch.tensor([0.1, 0.2, 0.7], dtype=F64)
    game = PreferenceGame(tabular.random_games(6, 4).reshape(2, 3, 4, 4), rho=rho)
    values = torch.randn(2, 3, dtype=F64)
    torch.testing.assert_close(game.over_contexts(values), values @ rho)


def test_bradley_terry_fit_depends_on_the_sampling_where_preference_does_not() -> None:
    dice = tabular.dice_game()[0]
    for sampling, rewards in (
        ((1 / 3, 1 / 3, 1 / 3), (0.0, 0.0, 0.0)),
        ((0.6, 0.3, 0.1), (0.0445, -0.1113, 0.0668)),
        ((0.1, 0.3, 0.6), (-0.0668, 0.1113, -0.0445)),
    ):
        fit = tabular.bradley_terry_fit(dice, torch.tensor(sampling, dtype=F64))
        torch.testing.assert_close(fit, torch.tensor(rewards, dtype=F64), rtol=0, atol=5e-5)
    true = torch.tensor([0.3, -1.0, 0.7], dtype=F64)
    fit = tabular.bradley_terry_fit(tabular.bradley_terry_game(true), torch.tensor([0.2, 0.5, 0.3], dtype=F64))
    torch.testing.assert_close(fit, true, rtol=0, atol=1e-10)


def test_reward_optimal_is_not_preference_optimal() -> None:
    """R = (0, log 9, log 2) over policies with pi(y1) = 2 pi(y2): the best reward loses to the best preference."""
    preference = tabular.bradley_terry_game(torch.tensor([0, math.log(9), math.log(2)], dtype=F64))
    rewards = torch.tensor([0, math.log(9), math.log(2)], dtype=F64)
    shares = torch.linspace(0, 1, 1001, dtype=F64)[:, None]
    family = shares * torch.tensor([[2 / 3, 1 / 3, 0]], dtype=F64) + (1 - shares) * torch.tensor([[0, 0, 1.0]])
    by_reward = family[(family @ rewards).argmax()]
    torch.testing.assert_close(by_reward, torch.tensor([2 / 3, 1 / 3, 0], dtype=F64))
    worst = (family @ preference @ family.mT).min(-1).values  # against the worst opponent in the family
    by_preference = family[worst.argmax()]
    torch.testing.assert_close(by_preference, torch.tensor([0, 0, 1.0], dtype=F64))
    assert float(by_preference @ preference @ by_reward) == pytest.approx(50 / 99)


def test_rlhf_jumps_where_the_equilibrium_moves_smoothly() -> None:
    sampling = torch.full((3,), 1 / 3, dtype=F64)
    for epsilon, best in ((-0.05, 1), (0.05, 0)):
        game = PreferenceGame(tabular.diversity_game(epsilon)[0], tau=1e-3)
        assert tabular.rlhf(game, sampling).exp()[best] > 0.99
        expected = torch.tensor([1 / 3 + epsilon / 2, 1 / 3 + epsilon / 2, 1 / 3 - epsilon], dtype=F64)
        torch.testing.assert_close(tabular.equilibrium(game, tolerance=1e-11).exp(), expected, rtol=0, atol=3e-3)


@pytest.mark.parametrize(("tau", "first"), [(0.1, 0.9933), (0.5, 0.7311), (1, 0.6225), (10, 0.5125)])
def test_ipo_of_one_comparison(tau, first) -> None:
    """With a deterministic preference, IPO converges to sigmoid(1 / (2 tau)), DPO to 1 for every tau."""
    wins, uniform = torch.tensor([[0, 1], [0, 0]]), log(0.5, 0.5)
    assert tabular.ipo(wins, uniform, tau).exp()[0] == pytest.approx(1 / (1 + math.exp(-1 / (2 * tau))))
    assert tabular.ipo(wins, uniform, tau).exp()[0] == pytest.approx(first, abs=5e-5)
    near, far = (tabular.dpo(wins, uniform, tau, steps=steps).exp()[0] for steps in (10, 100_000))
    assert near < far
    assert far > (0.999 if tau <= 1 else 0.7)


@pytest.mark.parametrize(
    ("tau", "policy"),
    [
        (0.1, (0.964, 0.034, 0.001)),
        (0.5, (0.563, 0.289, 0.148)),
        (1, (0.448, 0.321, 0.230)),
        (10, (0.345, 0.333, 0.322)),
    ],
)
def test_ipo_of_three_comparisons(tau, policy) -> None:
    wins = torch.tensor([[0, 1, 1], [0, 0, 1], [0, 0, 0]])
    fit = tabular.ipo(wins, log(1 / 3, 1 / 3, 1 / 3), tau)
    torch.testing.assert_close(fit.exp(), torch.tensor(policy, dtype=F64), rtol=0, atol=6e-4)
    torch.testing.assert_close(fit[0] - fit[1], torch.tensor(1 / (3 * tau), dtype=F64))


GAME = PreferenceGame(tabular.dice_game())
BAD_GAMES = [
    ({"preference": [[0.5]]}, TypeError, "preference: expected a float32 or float64 tensor; got list"),
    ({"preference": torch.full((2, 2), 0.5).numpy()}, TypeError, "float64 tensor; got ndarray"),
    ({"preference": torch.full((2, 2), 1, dtype=torch.int64)}, TypeError, "got torch.int64"),
    ({"preference": torch.full((2, 3), 0.5)}, ValueError, r"expected shape \(..., A, A\) with A > 0; got \(2, 3\)"),
    ({"preference": torch.tensor([[0.5, 1.2], [-0.2, 0.5]])}, ValueError, r"got P\(0 > 1\) = 1.2"),
    (
        {"preference": torch.tensor([[[0.5, 0.5], [0.5, 0.5]], [[0.5, 0.7], [0.4, 0.5]]])},
        ValueError,
        r"got P\(0 > 1\) in game \[1\] = 0.7 and 0.4 the other way round",
    ),
    ({"preference": torch.tensor([[0.6, 0.5], [0.5, 0.5]])}, ValueError, r"got P\(0 > 0\) = 0.6"),
    ({"tau": 0}, ValueError, "tau: expected a finite number above 0; got 0"),
    ({"tau": math.nan}, ValueError, "tau: expected a finite number above 0; got nan"),
    ({"reference": torch.tensor([0.5, 0.5, 0.0])}, ValueError, "reference: expected shape"),
    ({"reference": torch.tensor([1.0, 0.0])}, ValueError, "expected full support; action 1 has probability 0"),
    ({"reference": torch.tensor([0.6, 0.6])}, ValueError, "reference: expected probabilities that sum to 1"),
    ({"rho": torch.tensor([0.5, 0.5])}, ValueError, "rho: expected 1 probabilities; got 2"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_GAMES)
def test_what_is_no_game_is_refused(change, error, message) -> None:
    with pytest.raises(error, match=message):
        PreferenceGame(**{"preference": torch.full((2, 2), 0.5), **change})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tabular.cyclic_game(0.3), r"win: expected a probability in \[0.5, 1\]; got 0.3"),
        (lambda: tabular.cyclic_game(actions=4), "actions: expected an odd number from 3; got 4"),
        (lambda: tabular.diversity_game(0.4), "epsilon: expected a number"),
        (lambda: tabular.low_rank_game(torch.zeros(4, 3)), "embeddings: expected an even last dimension; got 3"),
        (lambda: tabular.game_from_counts(torch.zeros(2, 3)), "wins: expected shape"),
        (lambda: tabular.game_from_counts(torch.full((2, 2), -1)), "wins: expected counts of at least 0; got -1"),
        (lambda: tabular.game_from_counts(torch.ones(2, 2), 0), r"smoothing: expected a finite number in \(0.0, inf\)"),
        (lambda: tabular.solve(GAME, steps=2.5), r"expected increasing whole numbers from 1; got \(2.5,\)"),
        (lambda: tabular.solve(GAME, "omd", step=math.nan), "solve: step: expected a finite number"),
        (lambda: tabular.rlhf(PreferenceGame(tabular.dice_game()), torch.ones(3)), "rlhf: game: expected one game"),
    ],
)
def test_bad_input_of_constructors_is_named(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("option", "value"), [("stepp", 1.0), ("step", "1")])
def test_options_of_an_algorithm_are_checked(option, value) -> None:
    with pytest.raises(
        TypeError, match=r"solve: (nash-md: expected options .*step.*; got 'stepp'|step: expected a number)"
    ):
        tabular.solve(GAME, "nash-md", **{option: value})
