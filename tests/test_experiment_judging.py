"""Annotators, and the verdicts drawn from win rates."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations, product

import pytest
import torch

pytest.importorskip("transformers", reason="the experiment needs transformers")
pytest.importorskip("accelerate", reason="the experiment needs accelerate")

from nlhf_kernels.evaluation import Tournament, count_cycles
from nlhf_kernels.experiment.annotators import Annotators, Trigrams, common_scales, coverage, majority
from nlhf_kernels.experiment.claims import (
    CONTRADICTED,
    OPEN,
    REPRODUCED,
    TOO_SMALL,
    beats_rewards,
    by_beta,
    interior_beta,
)
from nlhf_kernels.experiment.equal_kl import EqualKL
from nlhf_kernels.preference import check_antisymmetry

TRUTH = "Return the names of all users."
LANGUAGE = Trigrams(["Return the names of all users.", "Return the size of the file.", "Remove the file."])


def annotators(scales=(0.1, 1.0, 0.5)) -> Annotators:
    return Annotators({"p": TRUTH}, LANGUAGE, scales)


def test_each_annotator_has_its_own_taste() -> None:
    judge = annotators()
    vote = lambda a, b: judge.votes(["p"], [a], [b])[0].tolist()  # noqa: E731
    covering, short = "Return the names of all users of the file.", "Remove the file."
    coverage_vote, brevity_vote, _ = vote(covering, short)
    assert coverage_vote > 0.9 and brevity_vote < 0.1
    _, same_length, fluency_vote = vote("Return the size of the file.", "File the of size the return.")
    assert same_length == 0.5 and fluency_vote > 0.9
    assert vote("Remove it.", "Remove.")[1] == 0.5, "below four words, shorter is not better"


def test_the_majority_is_counted_over_all_outcomes_of_three_votes() -> None:
    votes = torch.rand(50, 3, dtype=torch.float64)
    expected = torch.zeros(50, dtype=torch.float64)
    for outcome in product((0, 1), repeat=3):
        if sum(outcome) >= 2:
            expected += torch.stack([votes[:, i] if yes else 1 - votes[:, i] for i, yes in enumerate(outcome)]).prod(0)
    assert torch.allclose(majority(votes), expected)


def test_the_majority_judges_both_ways_alike_and_nothing_loses() -> None:
    judge = annotators()
    texts = ["Return the names.", "Remove the file of users.", "", "...", "Return.", TRUTH]
    pairs = list(product(texts, texts))
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    assert check_antisymmetry(judge, ["p"] * len(pairs), first, second) < 1e-9
    assert float(judge(["p"], [""], ["Return."])[0]) == pytest.approx(0.0)
    assert float(judge(["p"], [""], ["..."])[0]) == 0.5
    with pytest.raises(ValueError, match=r"annotators: prompts: expected one whose first line is known; got 'q'"):
        judge(["q"], ["a"], ["b"])
    with pytest.raises(ValueError, match=r"scales: expected a finite number in \(0.0"):
        annotators((0.0, 1.0, 1.0))
    with pytest.raises(ValueError, match=r"scales: expected one per taste, 3; got 2"):
        annotators((1.0, 1.0))


def test_sampled_votes_follow_the_probabilities() -> None:
    judge, count = annotators(), 4000
    first, second = "Return the names of it all.", "Remove the names."
    expected = float(judge(["p"], [first], [second])[0])
    votes = judge.sample_votes(["p"] * count, [first] * count, [second] * count, seed=1)
    assert 0.05 < expected < 0.95, "else nothing is tested"
    assert abs(float(votes.double().mean()) - expected) < 5 * math.sqrt(expected * (1 - expected) / count)
    assert torch.equal(votes, judge.sample_votes(["p"] * count, [first] * count, [second] * count, seed=1))


def test_coverage_counts_what_of_the_truth_is_said() -> None:
    assert coverage(TRUTH, TRUTH) == 1.0
    assert coverage(TRUTH, "") < 0.01
    assert 0.3 < coverage(TRUTH, "Return the names.") < 0.7
    assert coverage(TRUTH, f"{TRUTH} And more of it.") == pytest.approx(1.0, abs=0.1)


def test_scales_are_what_scores_differ_by_and_never_zero() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2000, 4, 3, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.0], dtype=torch.float64)
    scores[0] = -1e6  # answers without words are left out
    scales = common_scales(scores, 0.5)
    assert scales[0] == pytest.approx(0.5 * 2**0.5, rel=0.05)
    assert scales[1] == pytest.approx(5 * 0.5 * 2**0.5, rel=0.05)
    assert scales[2] == 1e-3


def test_majorities_of_transitive_tastes_can_cycle() -> None:
    """Three voters with rotated orders of three options make a cyclic majority (Condorcet's paradox), from scores."""
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [2.0, 1.0, 3.0]], dtype=torch.float64)  # option, taste
    table = majority(((scores[:, None] - scores[None]) / 0.3).sigmoid())[None]
    cycles = count_cycles(table, [["a", "b", "c"]])
    assert (cycles.triples, cycles.cyclic) == (1, 1)


BETAS = ("nash-md-0", "nash-md-0.25", "nash-md-1")


def results(noise: float, runs: int = 3, prompts: int = 200, **means: float) -> EqualKL:
    """Make a comparison with these means ("first>second") at 1 nat and noise over prompts; runs hardly differ.

    Every contestant has one policy, with a KL of exactly 1, and so is compared as it is.
    """
    names = list(dict.fromkeys(name for match in means for name in match.split(">")))
    generator = torch.Generator().manual_seed(0)
    spread = 1e-5 * torch.arange(runs)[:, None]
    values = {tuple(match.split(">")): mean + noise * torch.randn(1, prompts, generator=generator) + spread
              for match, mean in means.items()}  # fmt: skip
    values |= {("sft", name): torch.full((runs, prompts), 0.4) for name in names}
    kl = {name: torch.ones(runs, prompts, dtype=torch.float64) for name in names}
    kl["sft"] = torch.zeros(1, prompts, dtype=torch.float64)
    return EqualKL(Tournament(["sft", *names], values), kl, {name: [name] for name in names}, "sft", 2.0)


def two_taus() -> EqualKL:
    """Two contestants of two policies each: of KL 1 and 4, and of KL 2.25 and 9, on 200 prompts in 3 runs."""
    kls = {"rlhf-tau0": 1.0, "rlhf-tau1": 4.0, "nash-md-0-tau0": 2.25, "nash-md-0-tau1": 9.0, "sft": 0.0}
    generator = torch.Generator().manual_seed(1)
    names = list(kls)
    values = {match: torch.rand(3, 200, generator=generator, dtype=torch.float64)
              for match in combinations(names, 2)}  # fmt: skip
    kl = {name: torch.full((1 if name == "sft" else 3, 200), each, dtype=torch.float64) for name, each in kls.items()}
    kl["rlhf-tau1"][:, :100] = 2.0  # and 6 at the other prompts
    kl["rlhf-tau1"][:, 100:] = 6.0
    frontiers = {name: [f"{name}-tau{index}" for index in (0, 1)] for name in ("rlhf", "nash-md-0")}
    return EqualKL(Tournament(names, values), kl, frontiers, "sft", 3.0)


def test_contestants_are_compared_at_the_budget_or_where_all_of_them_come() -> None:
    equal = two_taus()
    assert equal.names == ["sft", "rlhf", "nash-md-0"]
    assert equal.level == 3.0 and replace(equal, budget=5.0).level == 4.0, "RLHF goes no farther than 4"
    assert (equal.nearest("rlhf"), equal.nearest("nash-md-0")) == (1, 0)
    at = [[0.0, 2 - 3**0.5, 3**0.5 - 1], [0.0, (3 - 3**0.5) / 1.5, (3**0.5 - 1.5) / 1.5]]  # shares of a side's policies
    sides = [["sft", f"{name}-tau0", f"{name}-tau1"] for name in ("rlhf", "nash-md-0")]
    expected = sum(
        p * q * float(equal.tournament.match(a, b).mean())
        for p, a in zip(at[0], sides[0], strict=True)
        for q, b in zip(at[1], sides[1], strict=True)
        if p * q
    )
    assert equal.rate("rlhf", "nash-md-0").mean == pytest.approx(expected)
    alone = sum(p * float(equal.tournament.match(a, "sft").mean()) for p, a in zip(at[0], sides[0], strict=True))
    assert equal.rate("rlhf", "sft").mean == pytest.approx(alone), "the reference plays as it is"
    matrix = equal.matrix
    assert matrix[1][2]["mean"] == pytest.approx(expected) and matrix[2][1]["mean"] == pytest.approx(1 - expected)
    assert [point.kl.mean for point in equal.points("rlhf", (0.1, 0.01))] == pytest.approx([0.0, 1.0, 4.0])
    assert equal.points("rlhf", (0.1, 0.01))[0].rate.mean == 0.5


def test_on_some_prompts_contestants_are_compared_at_equal_kl_on_these() -> None:
    equal = two_taus().on(range(100))
    assert equal.level == 2.0, "there RLHF goes no farther"
    assert equal.rate("rlhf", "sft").prompts == 100
    expected = float(two_taus().tournament.match("rlhf-tau1", "sft")[:, :100].mean())
    assert equal.rate("rlhf", "sft").mean == pytest.approx(expected)
    claim = beats_rewards(two_taus(), list(range(100)))
    assert claim is not None and claim["kl"] == 2.0 and claim["prompts"] == 100


def test_contestants_that_beat_each_other_in_turn_are_found() -> None:
    means = {"rlhf>nash-md-0": 0.6, "nash-md-0>nash-md-1": 0.6, "nash-md-1>rlhf": 0.6}
    assert results(0.01, **means).cycles() == [["rlhf", "nash-md-0", "nash-md-1"]]
    assert results(0.01, **{**means, "nash-md-1>rlhf": 0.4}).cycles() == []


@pytest.mark.parametrize(
    ("noise", "inner", "verdict"),
    [
        (0.1, (0.6, 0.6), REPRODUCED),
        (0.1, (0.4, 0.6), CONTRADICTED),
        (2.0, (0.6, 0.6), OPEN),
        (0.001, (0.503, 0.6), OPEN),
    ],
)
def test_the_first_claim_is_decided_by_the_numbers(noise, inner, verdict) -> None:
    zero, quarter, one = BETAS
    equal = results(noise, **{f"{quarter}>{zero}": inner[0], f"{quarter}>{one}": inner[1], f"{zero}>{one}": 0.5})
    claim = interior_beta(equal)
    assert claim is not None and claim["verdict"] == verdict
    assert claim["best"] == "Nash-MD 0.25" and len(claim["matches"]) == 2


@pytest.mark.parametrize(
    ("noise", "mean", "verdict"), [(0.1, 0.6, REPRODUCED), (0.1, 0.4, CONTRADICTED), (3.0, 0.6, OPEN)]
)
def test_the_second_claim_is_decided_by_the_numbers(noise, mean, verdict) -> None:
    equal = results(noise, **{"nash-md-0.25>rlhf": mean, "nash-md-1>rlhf": 0.9, "nash-md-0.25>nash-md-1": 0.5})
    claim = beats_rewards(equal, None)
    assert claim is not None and claim["verdict"] == verdict
    assert claim["compared"] == 1, "best response is no Nash learning"
    few = beats_rewards(equal, [3])
    assert few is not None and few["verdict"] == TOO_SMALL and few["prompts"] == 1
    some = beats_rewards(equal, list(range(100)))
    assert some is not None and some["prompts"] == 100 and "cycle" in some["claim"] and some["verdict"] == verdict


@pytest.mark.parametrize(("runs", "prompts"), [(1, 200), (2, 200), (3, 99), (3, 6)])
def test_little_evidence_decides_nothing(runs, prompts) -> None:
    """Few runs or prompts give no verdict, however narrow the intervals: six prompts once "reproduced" a claim."""
    zero, quarter, one = BETAS
    means = {f"{quarter}>{zero}": 0.9, f"{quarter}>{one}": 0.9, f"{zero}>{one}": 0.5, "rlhf>nash-md-0.25": 0.1,
             "rlhf>nash-md-0": 0.1}  # fmt: skip
    equal = results(0.01, runs, prompts, **means)
    for claim in (interior_beta(equal), beats_rewards(equal, None)):
        assert claim is not None and claim["verdict"] == TOO_SMALL and claim["matches"][0]["mean"] > 0.8


def test_claims_that_cannot_be_asked_are_not_answered() -> None:
    equal = results(0.1, **{"rlhf>nash-md-1": 0.5})
    assert interior_beta(equal) is None
    assert beats_rewards(equal, None) is None
    points = by_beta(equal)
    assert [(point["beta"], point["against"]) for point in points] == [(1.0, "RLHF")]
