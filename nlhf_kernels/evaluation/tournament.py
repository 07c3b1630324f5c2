"""Win rates between policies, each against each, with confidence intervals, for one judge.

Value [s, p] of a match is the judge's mean P(y > y') over the answers of run s of both sides to prompt p. A policy
without runs (a supervised one) has the same answers in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from ..preference import Judge, checked
from .answers import Answers
from .intervals import Estimate, estimate_mean

Match = tuple[str, str]
MARGIN = 0.005  # a difference from 1/2 that is too small to matter


@dataclass(frozen=True)
class Tournament:
    """The judge's probabilities of every match.

    Args:
        names (list of N names): the policies.
        values (dict (first, second) -> tensor (runs, prompts)): P(first > second), one entry for every pair, in the
            order of the names.
    """

    names: list[str]
    values: dict[Match, torch.Tensor]

    def match(self, first: str, second: str) -> torch.Tensor:
        """Return the values of P(first > second), (runs, prompts).

        Args:
            first, second (str): names of policies; 1/2 where they are the same.
        """
        if (first, second) in self.values:
            return self.values[first, second]
        if (second, first) in self.values:
            return 1 - self.values[second, first]
        if first != second or first not in self.names:
            raise KeyError(f"tournament: {first} against {second}: expected two of {', '.join(self.names)}")
        return torch.full_like(next(iter(self.values.values())), 0.5)

    def rate(self, first: str, second: str, prompts: Sequence[int] | None = None, comparisons: int = 1) -> Estimate:
        """The win rate of `first` against `second` with its interval.

        Args:
            first, second (str): names of policies.
            prompts (sequence of int or None): indices of the prompts to take; None: all.
            comparisons (int): number of win rates from which the best is picked, for which the interval is widened.
        """
        values = self.match(first, second)
        return estimate_mean(values if prompts is None else values[:, list(prompts)], comparisons)

    def matrix(self) -> list[list[dict[str, Any] | None]]:
        """Win rates of row against column, as dicts; None on the diagonal."""
        return rate_matrix(self.names, self.rate)

    def cycles(self) -> list[list[str]]:
        """Return triples of policies of which each beats the next: mean win rates above 1/2 by more than MARGIN."""
        return beating_in_turn(self.names, lambda first, second: float(self.match(first, second).mean()))


def rate_matrix(names: Sequence[str], rate: Callable[[str, str], Estimate]) -> list[list[dict[str, Any] | None]]:
    """Return win rates of row against column, as dicts; None on the diagonal.

    Args:
        names (sequence of str): rows and columns.
        rate (function of two names): the win rate of the first against the second.
    """
    return [[None if row == column else rate(row, column).to_dict() for column in names] for row in names]


def beating_in_turn(names: Sequence[str], rate: Callable[[str, str], float]) -> list[list[str]]:
    """Return triples of names of which each beats the next and the last the first: rates above 1/2 by more than MARGIN.

    Args:
        names (sequence of names): the policies.
        rate (callable): (first, second) -> the mean of P(first > second).
    """
    return [
        [*way]
        for a, b, c in combinations(names, 3)
        for way in ((a, b, c), (a, c, b))
        if all(rate(first, second) > 0.5 + MARGIN for first, second in zip(way, (*way[1:], way[0]), strict=True))
    ]


def play_tournament(
    judge: Judge,
    prompts: Sequence[str],
    answers: Mapping[str, Sequence[Answers]],
    advance: Callable[[int], None] = lambda done: None,
) -> Tournament:
    """Evaluate every match by the judge, run s of one policy against run s of the other.

    The value of a prompt is the mean over all pairs of answers (README, eq. 2), or where both sides share their noise
    over all pairs of answers of different number (eq. 1).

    Args:
        judge (Judge): its probabilities are averaged as they are; no vote is drawn.
        prompts (sequence of P texts): the prompts.
        answers (mapping name -> sequence of Answers): one per training run, of as many runs each, or of one.
        advance (callable): called with the number of matches played so far.
    """
    if len(answers) < 2:
        raise ValueError(f"tournament: answers: expected at least two policies; got {len(answers)}")
    runs = max(len(each) for each in answers.values())
    uneven = [name for name, each in answers.items() if len(each) not in (1, runs)]
    if uneven:
        raise ValueError(f"tournament: answers: expected 1 or {runs} runs of each; got another number of {uneven[0]}")
    for name, policy_runs in answers.items():
        for run_answers in policy_runs:
            if len(run_answers.texts) != len(prompts):
                got = f"{len(run_answers.texts)} of {name}"
                raise ValueError(f"tournament: answers: expected answers to {len(prompts)} prompts; got {got}")
    matches = list(combinations(answers, 2))
    sides = {
        match: [[answers[name][run % len(answers[name])] for name in match] for run in range(runs)] for match in matches
    }
    for (first, second), pairs in sides.items():
        for a, b in pairs:
            counts = len(a.texts[0]), len(b.texts[0])
            if _share_noise(a, b) and (counts[0] != counts[1] or counts[0] < 2):
                raise ValueError(
                    f"tournament: answers: expected two or more to each prompt, as many of {first} as of {second}, as "
                    f"they share the noise of seed {a.seed}; got {counts[0]} and {counts[1]}"
                )
    values = {}
    for done, match in enumerate(matches, start=1):
        values[match] = torch.stack([_win_rates(judge, prompts, first, second) for first, second in sides[match]])
        advance(done)
    return Tournament(list(answers), values)


def _share_noise(first: Answers, second: Answers) -> bool:
    return first.seed is not None and first.seed == second.seed


def _win_rates(judge: Judge, prompts: Sequence[str], first: Answers, second: Answers) -> torch.Tensor:
    """Return the mean over each prompt's pairs, (P,) float64; pairs of the same texts are judged once."""
    shared = _share_noise(first, second)
    questions: dict[tuple[str, str, str], int] = {}
    pair_indices = [
        [
            questions.setdefault((prompt, a, b), len(questions))
            for i, a in enumerate(row_a)
            for j, b in enumerate(row_b)
            if i != j or not shared
        ]
        for prompt, row_a, row_b in zip(prompts, first.texts, second.texts, strict=True)
    ]
    columns = [list(column) for column in zip(*questions, strict=True)]
    probabilities = checked(judge)(*columns)
    return probabilities[torch.tensor(pair_indices, dtype=torch.int64, device="cpu")].mean(1)  # (P, pairs) -> (P,)
