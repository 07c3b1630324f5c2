"""Three annotators with different tastes, and what the majority of them prefers.

coverage   how much of the true first line the response holds: the share of its character trigrams
brevity    fewer words, down to four
fluency    mean log-probability per word under a trigram model of the true first lines

Each is sure of its taste in one degree: it votes for y over y' with probability sigmoid((s(y) - s(y')) / scale), its
scale being what its scores commonly differ by. The vote is the majority's. A majority of transitive tastes need not be
transitive: that is where cycles come from. A response without a word loses to one with words, whatever the taste.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch

from ..core.checks import check_number

TASTES = ("coverage", "brevity", "fluency")
TOKEN = re.compile(r"\w+|[^\w\s]")
_START, _END = "<s>", "</s>"  # of a text, for the trigrams
SHORTEST = 4  # words below which shorter is not better
_NOTHING = -1e6  # the score of a response without words


@dataclass
class Annotators:
    """A judge, as `preference` has them: (prompts, first, second) -> P(first preferred by the majority)."""

    truths: Mapping[str, str]  # prompt -> its true first line
    language: Trigrams
    scales: Sequence[float] = (1.0, 1.0, 1.0)  # one per taste
    name: str = "annotators"
    _known: dict[tuple[str, str], tuple[float, ...]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if len(self.scales) != len(TASTES):
            raise ValueError(f"annotators: scales: expected one per taste, {len(TASTES)}; got {len(self.scales)}")
        for scale in self.scales:
            check_number("annotators", "scales", scale, 0.0, open_low=True)

    def scores(self, prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:  # (N, 3) float64
        scores = [self._score(*pair) for pair in zip(prompts, responses, strict=True)]
        return torch.tensor(scores, dtype=torch.float64, device="cpu")

    def votes(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> torch.Tensor:
        """(N, 3) float64: each annotator's P(first > second)."""
        difference = self.scores(prompts, first) - self.scores(prompts, second)
        return (difference / difference.new_tensor(self.scales)).sigmoid()

    def __call__(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> torch.Tensor:
        return majority(self.votes(prompts, first, second))

    def drawn(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str], seed: int
    ) -> torch.Tensor:  # (N,) bool: whether the majority of three votes, each drawn, was for the first
        generator = torch.Generator().manual_seed(seed)
        votes = self.votes(prompts, first, second)
        return (torch.rand(votes.shape, generator=generator, dtype=torch.float64, device="cpu") < votes).sum(1) >= 2

    def _score(self, prompt: str, response: str) -> tuple[float, ...]:
        key = prompt, response
        if key not in self._known:
            if prompt not in self.truths:
                raise ValueError(f"annotators: prompts: expected one whose first line is known; got {prompt[:60]!r}")
            said = words(response)
            self._known[key] = (
                (
                    coverage(self.truths[prompt], response),
                    -float(max(len(said), SHORTEST)),
                    self.language.mean_log_probability(response),
                )
                if any(word.isalnum() for word in said)
                else (_NOTHING,) * 3
            )
        return self._known[key]


def majority(votes: torch.Tensor) -> torch.Tensor:  # (..., 3) -> (...)
    """P(at least two of three independent votes are for the first)."""
    a, b, c = votes.unbind(-1)
    return (a * b + a * c + b * c - 2 * a * b * c).clamp(0, 1)  # rounding may leave the interval


def coverage(truth: str, response: str) -> float:
    """The share of the truth's character trigrams, counted with their number, that the response holds."""
    wanted, had = _trigrams(truth), _trigrams(response)
    return sum((wanted & had).values()) / max(sum(wanted.values()), 1)


def _trigrams(text: str) -> Counter[str]:
    plain = f" {' '.join(words(text))} "
    return Counter(plain[i : i + 3] for i in range(len(plain) - 2))


def common_scales(scores: torch.Tensor, share: float) -> list[float]:  # (prompts, responses, 3)
    """`share` of the standard deviation of what two responses to a prompt differ by, taste by taste."""
    real = scores.masked_fill(scores <= _NOTHING, torch.nan)
    pairs = [real[:, i] - real[:, j] for i, j in combinations(range(scores.shape[1]), 2)]
    differences = torch.stack(pairs).flatten(0, 1)
    spread = (differences**2).nanmean(0).sqrt().nan_to_num()
    return [max(share * float(value), 1e-3) for value in spread]


def words(text: str) -> list[str]:
    return TOKEN.findall(text.lower())


class Trigrams:
    """p_0(w) = 1 / V, p_k(w | h) = a_k f(w | h) + (1 - a_k) p_(k-1)(w | h without its first word), where f is the
    frequency after h, k - 1 words long; a_k = 0 where h was never seen."""

    TRUST = (0.98, 0.7, 0.7)  # a_1, a_2, a_3

    def __init__(self, texts: Iterable[str]) -> None:
        self.counts: list[Counter[tuple[str, ...]]] = [Counter(), Counter(), Counter()]
        self.histories: list[Counter[tuple[str, ...]]] = [Counter(), Counter(), Counter()]
        for text in texts:
            row = [_START, _START, *words(text), _END]
            for place in range(2, len(row)):
                for order in range(3):
                    gram = tuple(row[place - order : place + 1])
                    self.counts[order][gram] += 1
                    self.histories[order][gram[:-1]] += 1
        if not self.counts[0]:
            raise ValueError("ngrams: texts: expected at least one; got none")
        self.vocabulary = len(self.counts[0]) + 1

    def mean_log_probability(self, text: str) -> float:
        """In nats per word, the end counted as one."""
        row = [_START, _START, *words(text), _END]
        return sum(math.log(self._probability(row[i - 2 : i + 1])) for i in range(2, len(row))) / (len(row) - 2)

    def _probability(self, gram: list[str]) -> float:
        value = 1 / self.vocabulary
        for order, trust in enumerate(self.TRUST):
            key = tuple(gram[2 - order :])
            seen = self.histories[order][key[:-1]]
            if seen:
                value = trust * self.counts[order][key] / seen + (1 - trust) * value
        return value
