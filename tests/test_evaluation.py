"""Win rates between policies, their intervals, and cycles, against brute force and known distributions."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers", reason="answers are sampled from transformers' models")

from nlhf_kernels.evaluation import Answers, count_cycles, estimate_mean, play_tournament, preference_table
from nlhf_kernels.evaluation.intervals import student

ORDER = {"rock": 0, "paper": 1, "scissors": 2}


def around(prompts, first, second) -> list[float]:
    """Rock, paper, scissors at the prompt "circle"; at others the later letter wins."""
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
    found = count_cycles(preference_table(around, prompts, responses), responses)
    assert (found.triples, found.cyclic, found.prompts) == (2, 1, 2), "equal responses make no triple"
    assert found.cyclic_prompts == (0,)
    assert found.share == 0.5


def test_a_random_tournament_is_cyclic_a_quarter_of_the_time() -> None:
    torch.manual_seed(0)
    table = torch.rand(1500, 3, 3).triu(1)
    table = table + (1 - table).tril(-1).transpose(1, 2).tril(-1) * 0
    table = torch.where(torch.ones(3, 3).triu(1).bool(), table, 1 - table.transpose(1, 2))
    found = count_cycles(table, [["a", "b", "c"]] * 1500)
    assert found.triples == 1500
    assert abs(found.share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 1500)


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    generator, covered, rounds = torch.Generator().manual_seed(3), 0, 600
    for _ in range(rounds):
        prompts = torch.randn(1, 40, generator=generator)
        seeds = torch.randn(3, 1, generator=generator)
        found = estimate_mean(0.5 + 0.1 * prompts + 0.05 * seeds + 0.1 * torch.randn(3, 40, generator=generator))
        covered += found.low <= 0.5 <= found.high
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
