"""The paper's theory, checked numerically: convergence, rates, and limits."""

from __future__ import annotations

import pytest
import torch

from nlhf_kernels import tabular
from nlhf_kernels.tabular import PreferenceGame, kl_divergence, solve

F64 = torch.float64


@pytest.fixture(scope="module")
def many() -> PreferenceGame:
    """Return two thousand random games of ten actions, with random references."""
    generator = torch.Generator().manual_seed(3)
    reference = torch.rand(2000, 10, generator=generator, dtype=F64) + 0.05
    return PreferenceGame(tabular.random_games(2000, 10), reference / reference.sum(-1, keepdim=True), tau=0.5)


@pytest.fixture(scope="module")
def star(many) -> torch.Tensor:
    return tabular.equilibrium(many)


def test_equilibrium_is_the_fixed_point(many, star) -> None:
    """log pi* = log mu + P(. > pi*) / tau + const, and its exploitability is 0."""
    torch.testing.assert_close(tabular.best_response(star, many), star, rtol=0, atol=1e-12)
    assert tabular.exploitability(star, many).abs().max() < 1e-13
    moved = (star + 0.01 * torch.randn(star.shape, dtype=F64)).log_softmax(-1)
    assert (tabular.exploitability(moved, many) > 1e-9).all()


def test_theorem_1_bound_and_recursion(many, star) -> None:
    """KL(pi*, pi_T) <= 8 / (tau^2 (T + 1)), and at each step KL <= (1 - eta tau) KL + 2 eta^2."""
    marks = range(1, 201)
    solution = solve(many, "nash-md", marks=marks)
    kl = kl_divergence(star.expand_as(solution.trajectory), solution.trajectory)  # (T, G)
    t = torch.arange(1, 201, dtype=F64)[:, None]
    assert (kl <= 8 / (many.tau**2 * (t + 1)) + 1e-12).all()
    before = torch.cat([kl_divergence(star, many.log_reference)[None], kl[:-1]])
    eta = 2 / (many.tau * (t + 1))  # the step that leads to pi_t has index t - 1
    assert (kl <= (1 - eta * many.tau) * before + 2 * eta**2 + 1e-12).all()
    assert (kl[-1] < 1e-3).all(), "it does converge, far below the bound"


@pytest.mark.parametrize("step", [0.1, 0.3])
def test_constant_step_reaches_another_equilibrium(many, step) -> None:
    """The policy does not converge to pi*_tau; its mixture converges to the equilibrium of tau / (1 - eta tau)."""
    last = solve(many, "nash-md", steps=4000, step=step).log_policy
    b = step * many.tau
    mixture = ((1 - b) * last + b * many.log_reference).log_softmax(-1)
    other = tabular.equilibrium(PreferenceGame(many.preference, many.reference, many.tau / (1 - b)))
    torch.testing.assert_close(mixture, other, rtol=0, atol=1e-11)
    assert tabular.exploitability(last, many).max() > 1e-6


def test_nash_mp_is_linear_in_its_last_iterate(many, star) -> None:
    """KL_k <= (1 + 2 tau)^-k KL_0 with eta = 2 tau."""
    marks = range(1, 41)
    solution = solve(many, "nash-mp", marks=marks)
    kl = kl_divergence(star.expand_as(solution.trajectory), solution.trajectory)
    k = torch.arange(1, 41, dtype=F64)[:, None]
    start = kl_divergence(star, many.log_reference)
    assert (kl <= (1 + 2 * many.tau) ** -k * start + 1e-14).all()


def test_nash_mp_is_the_published_map() -> None:
    """theta_half = (theta + eta theta_mu + eta/tau P pi) / (1 + eta), and the same again from theta with P pi_half."""
    game = PreferenceGame(tabular.random_games(1, 6)[0], tau=0.2)
    eta, theta = 0.7, torch.randn(6, dtype=F64)
    advance = lambda log_pi: (  # noqa: E731
        (theta + eta * game.log_reference + eta / game.tau * game.expected(log_pi)) / (1 + eta)
    ).log_softmax(-1)
    expected = advance(advance(theta.log_softmax(-1)))
    policy = solve(game, "nash-mp", steps=1, start=theta, eta=eta).log_policy
    torch.testing.assert_close(policy, expected, rtol=0, atol=1e-14)
    same = solve(game, "egpo", steps=1, start=theta, step=eta / (game.tau * (1 + eta))).log_policy
    assert torch.equal(policy, same)


def test_online_mirror_descent_circles_above_its_step_limit() -> None:
    """On a cycle, linearised at the uniform equilibrium, a step multiplies by |1 - eta tau + i eta / (2 sqrt 3)|."""
    game = PreferenceGame(tabular.cyclic_game()[0], tau=0.02)
    start = torch.tensor([0.1, 0.0, 0.0], dtype=F64)
    limit = 2 * game.tau / (game.tau**2 + 1 / 12)  # where that modulus is 1
    for factor, converges in ((0.8, True), (1.25, False)):
        last = solve(game, "omd", steps=4000, start=start, step=factor * limit).log_policy
        away = kl_divergence(game.log_reference, last)
        assert (away < 1e-6) == converges, (factor, away)


@pytest.mark.parametrize("algorithm", ["nash-md", "omd", "ema", "egpo", "nash-mp", "policy-gradient"])
def test_algorithms_approach_the_equilibrium_of_friendly_games(algorithm) -> None:
    game = PreferenceGame(tabular.random_games(20, 6), tau=0.3)
    gaps = tabular.exploitability(solve(game, algorithm, marks=(20, 4000)).trajectory, game).mean(-1)
    assert gaps[1] < 1e-4
    assert gaps[1] < 0.1 * gaps[0] or gaps[0] < 1e-10


def test_best_response_to_the_reference_is_what_its_name_says() -> None:
    game = PreferenceGame(tabular.random_games(20, 6), tau=0.3)
    last = solve(game, "best-response", steps=2000).log_policy
    torch.testing.assert_close(last, tabular.best_response(game.log_reference, game), rtol=0, atol=1e-10)


@pytest.mark.parametrize("algorithm", ["nash-md", "omd"])
def test_sampled_opponents_approach_the_exact_run(algorithm) -> None:
    """Preferences estimated from n samples have noise of order 1 / sqrt(n); runs with them still converge."""
    game = PreferenceGame(tabular.random_games(200, 5), tau=0.5)
    exact = solve(game, algorithm, steps=30).log_policy
    errors = []
    for samples in (4, 400):
        noisy = solve(game, algorithm, steps=30, samples=samples).log_policy
        errors.append(float(kl_divergence(exact, noisy).mean()))
    assert errors[1] < errors[0] / 20
    assert tabular.exploitability(solve(game, algorithm, steps=1000, samples=4).log_policy, game).mean() < 5e-3


def test_known_equilibria() -> None:
    dice = PreferenceGame(tabular.dice_game()[0], tau=0.05)
    torch.testing.assert_close(tabular.equilibrium(dice), dice.log_reference, rtol=0, atol=1e-12)
    for epsilon in (-0.2, 0.0, 0.1, 0.3):
        game = PreferenceGame(tabular.diversity_game(epsilon)[0], tau=1e-4)
        expected = torch.tensor([1 / 3 + epsilon / 2, 1 / 3 + epsilon / 2, 1 / 3 - epsilon], dtype=F64)
        far = tabular.equilibrium(game, tolerance=1e-10).exp()
        torch.testing.assert_close(far, expected, rtol=0, atol=3e-3)


def test_a_game_with_nan_is_flagged_and_the_others_finish() -> None:
    preference = tabular.random_games(3, 4)
    preference[1, 2, 0] = torch.nan
    game = PreferenceGame(preference)
    for solution in (solve(game, name, steps=5) for name in tabular.ALGORITHMS):
        assert solution.ok.tolist() == [True, False, True]
        assert solution.log_policy[[0, 2]].isfinite().all()
    assert tabular.equilibrium(game)[[0, 2]].isfinite().all()


def test_marks_and_batches_do_not_change_the_path() -> None:
    game = PreferenceGame(tabular.random_games(6, 4).reshape(2, 3, 4, 4))
    for algorithm in tabular.ALGORITHMS:
        one = solve(game, algorithm, steps=50)
        many = solve(game, algorithm, marks=(1, 7, 50))
        assert one.log_policy.shape == (2, 3, 4)
        torch.testing.assert_close(many.trajectory[-1], one.log_policy, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "nash"}, "algorithm: expected one of nash-md, omd"),
        ({"steps": 0}, "steps, marks: expected increasing whole numbers from 1; got"),
        ({"marks": (5, 5)}, "steps, marks: expected increasing"),
        ({"step": -0.1}, "step: expected a finite number in .0.0, inf.; got -0.1"),
        ({"start": torch.zeros(4)}, "start: expected"),
    ],
)
def test_bad_input_is_named(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        solve(PreferenceGame(tabular.dice_game()[0]), **options)


def test_an_equilibrium_out_of_reach_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="still moving by .* after 100 steps at tau"):
        tabular.equilibrium(PreferenceGame(tabular.random_games(1, 5)[0], tau=1e-6), max_steps=100)
