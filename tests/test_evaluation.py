"""Win rates between policies, their intervals, and cycles, against brute force and known distributions."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers", reason="answers are sampled from transformers' models")

from nlhf_kernels.evaluation import (
    Answers,
    Sampling,
    Weights,
    bootstrap,
    count_cycles,
    estimate_mean,
    kl_values,
    play_tournament,
    preference_table,
    sample_answers,
)
from nlhf_kernels.evaluation.intervals import student
from tests.support.tiny_models import tiny_model, tiny_tokenizer

ORDER = {"rock": 0, "paper": 1, "scissors": 2}


def around(prompts, first, second) -> list[float]:
    """Prefer by rock, paper, scissors at the prompt "circle"; at others prefer the later letter."""
    values = []
    for prompt, a, b in zip(prompts, first, second, strict=True):
        if prompt == "circle":
            values.append({0: 0.5, 1: 0.9, 2: 0.1}[(ORDER[a] - ORDER[b]) % 3])
        else:
            values.append(0.5 if a == b else float(a > b))
    return values


def test_cycles_are_counted_where_they_are() -> None:
    prompts = ["circle", "line", "circle"]
    responses = [["rock", "paper", "scissors"], ["a", "b", "c"], ["rock", "rock", "paper"]]
    cycles = count_cycles(preference_table(around, prompts, responses), responses)
    assert (cycles.triples, cycles.cyclic, cycles.prompts) == (2, 1, 2), "equal responses make no triple"
    assert cycles.cyclic_prompts == (0,)
    assert cycles.share == 0.5


def test_a_random_tournament_is_cyclic_a_quarter_of_the_time() -> None:
    torch.manual_seed(0)
    table = torch.rand(1500, 3, 3).triu(1)
    table = table + (1 - table).tril(-1).transpose(1, 2).tril(-1) * 0
    table = torch.where(torch.ones(3, 3).triu(1).bool(), table, 1 - table.transpose(1, 2))
    cycles = count_cycles(table, [["a", "b", "c"]] * 1500)
    assert cycles.triples == 1500
    assert abs(cycles.share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 1500)


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    generator, covered, rounds = torch.Generator().manual_seed(3), 0, 600
    for _ in range(rounds):
        prompts = torch.randn(1, 40, generator=generator)
        seeds = torch.randn(3, 1, generator=generator)
        interval = estimate_mean(0.5 + 0.1 * prompts + 0.05 * seeds + 0.1 * torch.randn(3, 40, generator=generator))
        covered += interval.low <= 0.5 <= interval.high
    assert covered / rounds > 0.95 - 3 * math.sqrt(0.05 * 0.95 / rounds)


def test_intervals_widen_for_choices_and_ask_for_prompts() -> None:
    values = torch.rand(2, 30)
    assert estimate_mean(values, comparisons=5).half > estimate_mean(values).half > 0
    assert estimate_mean(values[:1]).seeds == 1
    assert str(estimate_mean(torch.full((1, 4), 0.25))) == "0.250\u00a0±\u00a00.000"
    with pytest.raises(ValueError, match=r"expected at least 2 prompts; got 1"):
        estimate_mean(values[:, :1])


@pytest.mark.parametrize("degrees", [1, 2, 3, 9, 40])
@pytest.mark.parametrize("tail", [0.2, 0.025, 0.025 / 3, 0.001])
def test_students_t_is_scipys(degrees, tail) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert student(degrees, tail) == pytest.approx(stats.t.isf(tail, degrees), rel=1e-5)


def said(*texts: str) -> Answers:
    one = torch.ones(len(texts), 1)
    return Answers([[text] for text in texts], one.long(), one.bool(), None)


def test_everyone_meets_everyone_run_by_run() -> None:
    answers = {
        "sft": [said("a", "a")],
        "low": [said("b", "a"), said("a", "a")],
        "high": [said("c", "c"), said("c", "a")],
    }
    marks: list[int] = []
    tournament = play_tournament(around, ["x", "y"], answers, marks.append)
    assert marks == [1, 2, 3]
    assert tournament.match("high", "low").tolist() == [[1.0, 1.0], [1.0, 0.5]]
    assert tournament.match("low", "high").tolist() == [[0.0, 0.0], [0.0, 0.5]]
    assert tournament.match("sft", "low").tolist() == [[0.0, 0.5], [0.5, 0.5]], "the one run plays in all"
    matrix = tournament.matrix()
    assert matrix[0][0] is None and matrix[2][0]["mean"] == 1 - matrix[0][2]["mean"]
    assert tournament.match("low", "low").unique().tolist() == [0.5]
    with pytest.raises(ValueError, match=r"expected at least two policies; got 1"):
        play_tournament(around, ["x"], {"sft": [said("a")]})
    with pytest.raises(ValueError, match=r"expected 1 or 3 runs of each; got another number of low"):
        play_tournament(around, ["x"], {"a": [said("a")] * 3, "low": [said("a")] * 2})


def test_cycles_among_policies_are_found() -> None:
    answers = {name: [said(name, name)] for name in ("rock", "scissors", "paper")}
    assert play_tournament(around, ["circle", "circle"], answers).cycles() == [["rock", "scissors", "paper"]]
    assert play_tournament(around, ["line", "line"], answers).cycles() == []


PAYOFF = torch.tensor([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]], dtype=torch.float64)  # cyclic


def payoff(prompts, first, second) -> list[float]:
    return [float(PAYOFF[int(a), int(b)]) for a, b in zip(first, second, strict=True)]


def categorical(policy: torch.Tensor, uniforms: torch.Tensor, seed: int | None) -> Answers:
    """Draw answers "0", "1", "2" with these probabilities, by inversion: `uniforms` (P, K) is the noise."""
    actions = torch.searchsorted(policy.cumsum(0), uniforms).clamp(max=len(policy) - 1)
    nothing = torch.zeros(uniforms.shape)
    return Answers([[str(a) for a in row] for row in actions.tolist()], nothing.long(), nothing.bool(), None, seed)


def noise(prompts: int, samples: int, seed: int) -> torch.Tensor:
    return torch.rand(prompts, samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


NEAR = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.45, 0.33, 0.22], dtype=torch.float64)


@pytest.mark.parametrize("seeds", [(None, None), (4, 5), (4, None), (4, 4)])
def test_the_value_of_a_prompt_is_the_mean_over_all_pairs_of_answers(seeds) -> None:
    """The mean leaves out pairs of answers with the same sample number where both sides share their noise."""
    sides = [categorical(policy, noise(7, 3, side), seeds[side]) for side, policy in enumerate(NEAR)]
    values = play_tournament(payoff, [f"p{n}" for n in range(7)], {"a": sides[:1], "b": sides[1:]}).match("a", "b")
    for prompt in range(7):
        pairs = [
            payoff([""], [sides[0].texts[prompt][i]], [sides[1].texts[prompt][j]])[0]
            for i in range(3)
            for j in range(3)
            if seeds != (4, 4) or i != j
        ]
        assert float(values[0, prompt]) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


def test_shared_noise_changes_the_variance_and_not_the_win_rate() -> None:
    """Shared noise lowers the variance; pairs of one sample number, which the tournament omits, would be biased."""
    prompts, count = [str(n) for n in range(4000)], 4
    exact = float(NEAR[0] @ PAYOFF @ NEAR[1])
    shared, other = noise(len(prompts), count, 0), noise(len(prompts), count, 1)
    rates = {}
    for name, noises, seeds in (("shared", (shared, shared), (9, 9)), ("independent", (shared, other), (8, 9))):
        answers = {side: [categorical(*each)] for side, each in zip("ab", zip(NEAR, noises, seeds, strict=True),
                                                                    strict=True)}  # fmt: skip
        rates[name] = play_tournament(payoff, prompts, answers).rate("a", "b")
        assert abs(rates[name].mean - exact) < 2.5 * rates[name].half, name
    assert rates["shared"].half < 0.8 * rates["independent"].half
    a, b = (categorical(policy, shared, 9) for policy in NEAR)
    coupled = torch.tensor([payoff([""] * count, *each) for each in zip(a.texts, b.texts, strict=True)]).mean()
    assert abs(float(coupled) - exact) > 2.5 * rates["independent"].half, "else the other test shows nothing"


def test_a_policy_against_itself_is_even_to_the_last_bit() -> None:
    answers = {name: [categorical(NEAR[0], noise(50, 4, 3), 3)] for name in ("one", "same")}
    rate = play_tournament(payoff, [str(n) for n in range(50)], answers).rate("one", "same")
    assert rate.mean == pytest.approx(0.5, abs=1e-15) and rate.half < 1e-15


def test_probabilities_are_averaged_and_equal_questions_asked_once() -> None:
    questions: list[tuple[str, str, str]] = []

    def unsure(prompts, first, second) -> list[float]:
        questions.extend(zip(prompts, first, second, strict=True))
        return [0.3 if a < b else 0.7 for a, b in zip(first, second, strict=True)]

    one = torch.ones(2, 3)
    a, b = (Answers([[letter] * 3] * 2, one.long(), one.bool(), None) for letter in "ab")
    tournament = play_tournament(unsure, ["x", "y"], {"a": [a], "b": [b]})
    assert tournament.match("a", "b").tolist() == [[pytest.approx(0.3)] * 2], "no vote is drawn"
    assert sorted(questions) == [("x", "a", "b"), ("y", "a", "b")]


def test_answers_that_do_not_belong_together_are_refused() -> None:
    lone = {name: [categorical(NEAR[0], noise(2, 1, 0), 6)] for name in "ab"}
    with pytest.raises(ValueError, match=r"two or more .* share the noise of seed 6; got 1 and 1"):
        play_tournament(payoff, ["x", "y"], lone)
    uneven = {name: [categorical(NEAR[0], noise(2, count, 0), 6)] for name, count in (("a", 2), ("b", 3))}
    with pytest.raises(ValueError, match=r"as many of a as of b.*; got 2 and 3"):
        play_tournament(payoff, ["x", "y"], uneven)
    with pytest.raises(ValueError, match=r"expected answers to 3 prompts; got 2 of a"):
        play_tournament(payoff, ["x", "y", "z"], uneven)


def test_one_seed_gives_every_policy_the_same_noise() -> None:
    tokenizer = tiny_tokenizer()
    policy, near = tiny_model("llama", seed=0), tiny_model("llama", seed=0)
    with torch.no_grad():
        for value in near.parameters():
            value.mul_(1.002)
    prompts = [f"say {letter}" for letter in "abcdef"]
    ask = lambda model, seed: sample_answers(model, policy, tokenizer, prompts, Sampling(4, 32, 4, seed=seed))  # noqa: E731
    first, same_noise, other_noise = ask(policy, 1), ask(near, 1), ask(near, 2)
    flat = [[text for row in answers.texts for text in row] for answers in (first, same_noise, other_noise)]
    alike = [sum(a == b for a, b in zip(flat[0], each, strict=True)) for each in flat[1:]]
    assert alike[0] > 12 > 6 > alike[1], f"equal answers of 24: {alike}"
    assert (first.seed, other_noise.seed) == (1, 2)
    assert kl_values([first, same_noise]).shape == (2, 6) and float(kl_values([first]).abs().max()) < 1e-5
    with pytest.raises(ValueError, match=r"expected answers sampled with a reference"):
        kl_values([sample_answers(policy, None, tokenizer, prompts, Sampling(4, 32))])


def test_weighted_means_are_those_of_the_resampled_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(2, 3, 5, generator=generator, dtype=torch.float64)
    runs, prompts = torch.tensor([[0, 2], [1, 1]]), torch.tensor([[4, 4, 0, 1], [2, 3, 3, 3]])
    share = lambda rows, count: torch.stack([row.bincount(minlength=count) / len(row) for row in rows]).double()  # noqa: E731
    means = Weights(share(runs, 3), share(prompts, 5)).mean(values)
    for b in range(2):
        assert torch.allclose(means[b], values[:, runs[b]][:, :, prompts[b]].mean((1, 2)))


@pytest.mark.parametrize("runs", [1, 2, 5])
def test_the_bootstrap_of_a_mean_is_the_closed_form(runs) -> None:
    values = noise(runs, 60, runs)
    closed, resampled = estimate_mean(values), bootstrap(lambda w: w.mean(values), runs, 60, resamples=20000)
    assert resampled.mean == pytest.approx(closed.mean, abs=1e-12)
    assert resampled.half == pytest.approx(closed.half, rel=0.03)
    assert (resampled.prompts, resampled.seeds) == (60, runs)
    wide = bootstrap(lambda w: w.mean(values), runs, 60, comparisons=4)
    assert wide.half > 1.1 * resampled.half
    with pytest.raises(ValueError, match=r"bootstrap: prompts: expected an integer in \[2"):
        bootstrap(lambda w: w.mean(values), runs, 1)


def test_the_bootstrap_covers_a_ratio_as_often_as_it_says() -> None:
    generator, covered, rounds = torch.Generator().manual_seed(3), 0, 300
    for _ in range(rounds):
        effects = torch.randn(2, 1, 80, generator=generator) + 0.5 * torch.randn(2, 4, 1, generator=generator)
        values = torch.tensor([4.0, 8.0])[:, None, None] + effects + torch.randn(2, 4, 80, generator=generator)

        def ratio(weights: Weights, values: torch.Tensor = values) -> torch.Tensor:
            means = weights.mean(values)
            return means[:, 0] / means[:, 1]

        interval = bootstrap(ratio, 4, 80, resamples=300)
        covered += interval.low <= 0.5 <= interval.high
    assert covered / rounds > 0.95 - 3 * math.sqrt(0.05 * 0.95 / rounds)
