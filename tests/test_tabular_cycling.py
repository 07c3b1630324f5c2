"""Preferences of adjustable cyclicity, policies compared at equal KL: exact counts and bounds."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from nlhf_kernels.tabular import PreferenceGame, bradley_terry_game, cyclic_game, equilibrium, random_games
from nlhf_kernels.tabular.budget import at_budget, best_within, exploitability_within
from nlhf_kernels.tabular.cycling import cyclic_triple_share, taste_game, unrewarded_share
from nlhf_kernels.tabular.measures import kl_divergence

SIZE = 5


def tastes(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return qualities and angles of 20 games; the angles are a permuted regular pentagon."""
    generator = torch.Generator().manual_seed(seed)
    quality = torch.randn(20, SIZE, generator=generator, dtype=torch.float64)
    order = torch.rand(20, SIZE, generator=generator, dtype=torch.float64).argsort(-1)
    return quality, order.double() * (2 * math.pi / SIZE)


def counted(preference: torch.Tensor) -> float:
    """Count the share of cyclic triples of one game by enumeration."""
    cyclic = [
        sorted(sum(bool(preference[a, b] > 0.5) for b in triple if b != a) for a in triple) == [1, 1, 1]
        for triple in itertools.combinations(range(len(preference)), 3)
    ]
    return sum(cyclic) / len(cyclic)


def test_without_cycling_the_preferences_are_bradley_terry_with_the_qualities_as_rewards() -> None:
    quality, angle = tastes()
    preference = taste_game(quality, angle, 0.0, 3.0)
    torch.testing.assert_close(preference, bradley_terry_game(3.0 * quality), rtol=0, atol=1e-14)
    assert cyclic_triple_share(preference).eq(0).all()
    assert unrewarded_share(preference).abs().max() < 1e-20


def test_with_circles_only_half_of_a_pentagons_triples_cycle_and_no_reward_explains_anything() -> None:
    quality, angle = tastes()
    preference = taste_game(quality, angle, 1.0, 3.0)
    assert cyclic_triple_share(preference).tolist() == [0.5] * 20  # 5 of 10, the most that 5 responses can have
    torch.testing.assert_close(unrewarded_share(preference), torch.ones(20, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_knob_goes_from_one_to_the_other() -> None:
    quality, angle = tastes()
    games = [taste_game(quality, angle, knob / 10, 3.0) for knob in range(11)]
    for game in games:
        PreferenceGame(game)  # P(a > b) + P(b > a) = 1, in [0, 1]
    unrewarded = torch.stack([unrewarded_share(game) for game in games])
    assert (unrewarded.diff(dim=0) > 0).all(), "in every game, at every step"
    shares = torch.stack([cyclic_triple_share(game) for game in games])
    assert shares[0].eq(0).all() and shares[-1].eq(0.5).all()
    assert 0 < float(shares[5].mean()) < 0.5
    gap = quality.sort(-1).values.diff(dim=-1).amin(-1)  # between the two closest qualities
    for knob, share in zip(range(11), shares, strict=True):
        assert share[(10 - knob) * gap > knob].eq(0).all(), "qualities that outweigh any circle leave their order"


def test_cycles_are_counted_as_triple_by_triple() -> None:
    games = random_games(30, 6, seed=3)
    assert cyclic_triple_share(games).tolist() == pytest.approx([counted(game) for game in games], abs=1e-15)
    assert cyclic_triple_share(cyclic_game(0.9)).tolist() == [1.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: taste_game(*tastes(), 1.5, 1.0), "cycling: expected a number in .0, 1.; got 1.5"),
        (lambda: taste_game(*tastes(), 1.0, -1.0), "strength: expected a finite number of at least 0; got -1.0"),
        (lambda: cyclic_triple_share(torch.full((2, 2), 0.5)), "expected at least 3 responses; got 2"),
        (lambda: cyclic_triple_share(torch.full((3, 3), 0.5)), "expected no ties"),
        (lambda: best_within(torch.zeros(3), torch.zeros(3).log_softmax(-1), 0.0), "above 0; got 0.0"),
    ],
)
def test_what_is_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def games(count: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    log_reference = torch.randn(count, SIZE, generator=generator, dtype=torch.float64).log_softmax(-1)
    return random_games(count, SIZE, seed=4), log_reference


@pytest.mark.parametrize("budget", [0.01, 0.3, 1.0])
def test_the_best_within_a_budget_spends_it_and_nobody_within_it_is_better(budget) -> None:
    preference, log_reference = games()
    values = preference.mean(-1)
    best = best_within(values, log_reference, budget)
    top = log_reference.gather(-1, values.argmax(-1, keepdim=True)).squeeze(-1)
    spent = kl_divergence(best, log_reference)
    torch.testing.assert_close(spent, (-top).clamp(max=budget), rtol=0, atol=1e-3)  # the best action's KL is -top
    generator = torch.Generator().manual_seed(6)
    others = (log_reference + torch.randn(5000, 20, SIZE, generator=generator, dtype=torch.float64)).log_softmax(-1)
    allowed = kl_divergence(others, log_reference) <= budget
    worth = (others.exp() * values).sum(-1).masked_fill(~allowed, -1)
    assert allowed.any(0).all()
    assert (worth.amax(0) <= (best.exp() * values).sum(-1) + 1e-9).all()


def test_the_equilibrium_cannot_be_exploited_by_who_goes_no_further() -> None:
    preference, log_reference = games()
    for row in range(5):
        game = PreferenceGame(preference[row], log_reference[row].exp(), 0.2)
        star = equilibrium(game)
        budget = float(kl_divergence(star, log_reference[row]))
        assert abs(float(exploitability_within(star, preference[row], log_reference[row], budget))) < 1e-9
        shrunk = at_budget(star.unsqueeze(0), log_reference[row], budget / 2)
        assert float(exploitability_within(shrunk, preference[row], log_reference[row], budget)) > 1e-4


def test_a_frontier_ends_where_the_budget_does() -> None:
    preference, log_reference = games()
    frontier = torch.stack([(log_reference + preference.mean(-1) / tau).log_softmax(-1) for tau in (1.0, 0.3, 0.1)])
    reached = kl_divergence(frontier, log_reference)
    middle = float(reached[1].median())
    spent = kl_divergence(at_budget(frontier, log_reference, middle), log_reference)
    torch.testing.assert_close(spent, reached.amax(0).clamp(max=middle), rtol=0, atol=1e-12)
    torch.testing.assert_close(at_budget(frontier, log_reference, 100.0), frontier[-1], rtol=0, atol=1e-12)
    # interpolation within an exponential family stays in the family
    torch.testing.assert_close(at_budget(frontier, log_reference, middle),
                               best_within(preference.mean(-1), log_reference, middle), rtol=0, atol=1e-9)  # fmt: skip
