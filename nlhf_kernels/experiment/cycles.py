"""How often a preference runs in a circle: y over y', y' over y'', y'' over y."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from ..preference import Judge, checked


@dataclass(frozen=True)
class Cycles:
    """Among triples of distinct responses to one prompt; a triple with a tie in it is none."""

    triples: int
    cyclic: int
    prompts: int  # with such a triple
    cyclic_prompts: tuple[int, ...]  # indices of those with a cycle among their responses

    @property
    def share(self) -> float:
        return self.cyclic / self.triples if self.triples else 0.0


def pairwise(judge: Judge, prompts: Sequence[str], responses: Sequence[Sequence[str]]) -> torch.Tensor:
    """P(response i > response j) for each prompt: (P, K, K) float64, 1/2 on the diagonal."""
    count = len(responses[0])
    pairs = list(combinations(range(count), 2))
    asked = [prompt for prompt in prompts for _ in pairs]
    first = [row[i] for row in responses for i, _ in pairs]
    second = [row[j] for row in responses for _, j in pairs]
    values = checked(judge)(asked, first, second).view(len(prompts), len(pairs))
    table = torch.full((len(prompts), count, count), 0.5, dtype=torch.float64, device="cpu")
    for column, (i, j) in enumerate(pairs):
        table[:, i, j], table[:, j, i] = values[:, column], 1 - values[:, column]
    return table


def count_cycles(table: torch.Tensor, responses: Sequence[Sequence[str]]) -> Cycles:  # (P, K, K)
    triples = cyclic = prompts = 0
    where = []
    for index, (row, texts) in enumerate(zip(table, responses, strict=True)):
        here = [
            is_cycle(row, triple)
            for triple in combinations(range(len(texts)), 3)
            if len({texts[i] for i in triple}) == 3 and not has_tie(row, triple)
        ]
        triples, cyclic, prompts = triples + len(here), cyclic + sum(here), prompts + bool(here)
        if any(here):
            where.append(index)
    return Cycles(triples, cyclic, prompts, tuple(where))


def has_tie(row: torch.Tensor, triple: tuple[int, ...]) -> bool:
    return any(float(row[i, j]) == 0.5 for i, j in combinations(triple, 2))


def is_cycle(row: torch.Tensor, triple: tuple[int, ...]) -> bool:  # (K, K)
    """Nobody of the three wins both of its matches."""
    wins = [sum(float(row[i, j]) > 0.5 for j in triple if j != i) for i in triple]
    return wins == [1, 1, 1]
