"""Everyone against everyone: win rates between policies, with confidence intervals, as each judge sees them.

Value [s, p] of a match is the judge's mean P(y > y') over the answers of run s of both sides to prompt p. A policy
without runs (the supervised one) plays the same answers in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from ..preference import Judge, checked
from .answers import Answers
from .intervals import Estimate, estimate

Match = tuple[str, str]
MARGIN = 0.005  # a preference below nobody would notice


@dataclass(frozen=True)
class Tournament:
    names: list[str]
    values: dict[Match, torch.Tensor]  # (seeds, prompts) for every pair, in the order of the names

    def match(self, first: str, second: str) -> torch.Tensor:  # (seeds, prompts): P(first > second)
        if (first, second) in self.values:
            return self.values[first, second]
        if (second, first) in self.values:
            return 1 - self.values[second, first]
        if first != second or first not in self.names:
            raise KeyError(f"tournament: {first} against {second}: expected two of {', '.join(self.names)}")
        return torch.full_like(next(iter(self.values.values())), 0.5)

    def rate(self, first: str, second: str, prompts: Sequence[int] | None = None, comparisons: int = 1) -> Estimate:
        values = self.match(first, second)
        return estimate(values if prompts is None else values[:, list(prompts)], comparisons)

    def matrix(self) -> list[list[dict[str, Any] | None]]:
        """Estimates, row against column; None on the diagonal."""
        return [
            [None if row == column else self.rate(row, column).to_dict() for column in self.names]
            for row in self.names
        ]  # fmt: skip

    def cycles(self) -> list[list[str]]:
        """Triples of policies of which each beats the next, by means above 1/2 and the margin."""
        found = []
        for triple in combinations(self.names, 3):
            a, b, c = triple
            for way in ((a, b, c), (a, c, b)):
                if all(
                    float(self.match(x, y).mean()) > 0.5 + MARGIN for x, y in zip(way, (*way[1:], way[0]), strict=True)
                ):
                    found.append(list(way))
        return found


def play(
    judge: Judge,
    prompts: Sequence[str],
    answers: Mapping[str, Sequence[Answers]],  # name -> one per run
    advance: Callable[[int], None] = lambda done: None,
) -> Tournament:
    """Run s of one side meets run s of the other; their k-th answers to a prompt meet."""
    if len(answers) < 2:
        raise ValueError(f"tournament: answers: expected at least two policies; got {len(answers)}")
    runs = max(len(each) for each in answers.values())
    uneven = [name for name, each in answers.items() if len(each) not in (1, runs)]
    if uneven:
        raise ValueError(f"tournament: answers: expected 1 or {runs} runs of each; got another number of {uneven[0]}")
    values = {}
    for done, (first, second) in enumerate(combinations(answers, 2), start=1):
        rows = []
        for run in range(runs):
            a, b = (answers[name][run % len(answers[name])] for name in (first, second))
            rows.append(_meet(judge, prompts, a, b))
        values[first, second] = torch.stack(rows)
        advance(done)
    return Tournament(list(answers), values)


def _meet(judge: Judge, prompts: Sequence[str], first: Answers, second: Answers) -> torch.Tensor:  # (P,)
    samples = len(first.texts[0])
    asked = [prompt for prompt in prompts for _ in range(samples)]
    texts = [[text for row in side.texts for text in row] for side in (first, second)]
    return checked(judge)(asked, *texts).view(len(prompts), samples).mean(1)
