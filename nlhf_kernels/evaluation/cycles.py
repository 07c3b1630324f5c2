"""Counts of cyclic preferences: y over y', y' over y'', y'' over y."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from ..preference import Judge, checked


@dataclass(frozen=True)
class Cycles:
    """Counts over triples of distinct responses to one prompt; a triple with a tie in it is not counted.

    Args:
        triples (int): triples counted.
        cyclic (int): those of them that are cycles.
        prompts (int): prompts with a triple.
        cyclic_prompts (tuple of int): indices of the prompts with a cycle.
    """

    triples: int
    cyclic: int
    prompts: int
    cyclic_prompts: tuple[int, ...]

    @property
    def share(self) -> float:
        return self.cyclic / self.triples if self.triples else 0.0


def preference_table(judge: Judge, prompts: Sequence[str], responses: Sequence[Sequence[str]]) -> torch.Tensor:
    """Return P(response i > response j) for each prompt, (P, K, K) float64, 1/2 on the diagonal, by one judge call.

    Args:
        judge (Judge): called with each pair i < j once; P(j > i) is the complement.
        prompts (sequence of P texts): the prompts.
        responses (sequence of P sequences of K texts): the responses to each.
    """
    count = len(responses[0])
    pairs = list(combinations(range(count), 2))
    questions = [prompt for prompt in prompts for _ in pairs]
    first = [row[i] for row in responses for i, _ in pairs]
    second = [row[j] for row in responses for _, j in pairs]
    values = checked(judge)(questions, first, second).view(len(prompts), len(pairs))
    table = torch.full((len(prompts), count, count), 0.5, dtype=torch.float64, device="cpu")
    for column, (i, j) in enumerate(pairs):
        table[:, i, j], table[:, j, i] = values[:, column], 1 - values[:, column]
    return table


def count_cycles(table: torch.Tensor, responses: Sequence[Sequence[str]]) -> Cycles:
    """Count the triples of distinct responses of which each is preferred to the next.

    Args:
        table (tensor (P, K, K)): P(response i > response j), of `preference_table`.
        responses (sequence of P sequences of K texts): equal texts are one response.
    """
    triples = cyclic = prompts = 0
    cyclic_prompts = []
    for index, (probabilities, texts) in enumerate(zip(table.tolist(), responses, strict=True)):
        counted = cycles_here = 0
        for triple in combinations(range(len(texts)), 3):
            distinct = len({texts[i] for i in triple}) == 3
            if distinct and not any(probabilities[i][j] == 0.5 for i, j in combinations(triple, 2)):
                counted += 1
                wins = [sum(probabilities[i][j] > 0.5 for j in triple if j != i) for i in triple]
                cycles_here += wins == [1, 1, 1]  # none of the three is preferred to both others
        triples, cyclic, prompts = triples + counted, cyclic + cycles_here, prompts + bool(counted)
        if cycles_here:
            cyclic_prompts.append(index)
    return Cycles(triples, cyclic, prompts, tuple(cyclic_prompts))
