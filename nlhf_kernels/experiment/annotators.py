"""Three annotators with different tastes, and what the majority of them prefers.

coverage   how much of the true first line the response holds: the share of its character trigrams
brevity    fewer words, down to four
fluency    mean log-probability per word under a trigram model of the true first lines

Each is sure of its taste in one degree: it votes for y over y' with probability sigmoid((s(y) - s(y')) / scale), its
scale being what its scores commonly differ by. The vote is the majority's. A majority of transitive tastes need not be
transitive: that is where cycles come from. A response without a word loses to one with words, whatever the taste.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch

from ..core.checks import check_number
from .ngrams import Trigrams, words

TASTES = ("coverage", "brevity", "fluency")
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
