"""Three simulated annotators with different criteria, and their majority vote.

coverage   the share of the true first line's character trigrams that the response has
brevity    fewer words, down to four
fluency    mean log-probability per word under a trigram model of the true first lines

An annotator with score s votes for y over y' with probability sigmoid((s(y) - s(y')) / scale), its scale being a share
of the usual difference of its scores. A majority of transitive preferences need not be transitive: hence cycles. A
response without a word loses to one with words, by every criterion.
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
    """A judge, as `preference` has them: (prompts, first, second) -> P(first preferred by the majority).

    Args:
        truths (mapping prompt -> text): the true first line of each prompt.
        language (Trigrams): of the true first lines.
        scales (sequence of 3 floats): one for each criterion, above 0; smaller scales give probabilities nearer 0 or 1.
        name (str): of the judge in errors.
    """

    truths: Mapping[str, str]
    language: Trigrams
    scales: Sequence[float] = (1.0, 1.0, 1.0)
    name: str = "annotators"
    _scores: dict[tuple[str, str], tuple[float, ...]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if len(self.scales) != len(TASTES):
            raise ValueError(f"annotators: scales: expected one per taste, {len(TASTES)}; got {len(self.scales)}")
        for scale in self.scales:
            check_number("annotators", "scales", scale, 0.0, open_low=True)

    def scores(self, prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
        """Score each response by each annotator, (N, 3) float64.

        Args:
            prompts, responses (sequences of N texts): the pairs to score.
        """
        scores = [self._score(*pair) for pair in zip(prompts, responses, strict=True)]
        return torch.tensor(scores, dtype=torch.float64, device="cpu")

    def votes(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> torch.Tensor:
        """Return each annotator's P(first > second), (N, 3) float64.

        Args:
            prompts, first, second (sequences of N texts): prompts and two responses to each.
        """
        difference = self.scores(prompts, first) - self.scores(prompts, second)
        return (difference / difference.new_tensor(self.scales)).sigmoid()

    def __call__(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> torch.Tensor:
        return majority(self.votes(prompts, first, second))

    def sample_votes(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str], seed: int
    ) -> torch.Tensor:
        """Sample three votes per pair; return whether the majority is for the first, (N,) bool.

        Args:
            prompts, first, second (sequences of N texts): prompts and two responses to each.
            seed (int): of the votes.
        """
        generator = torch.Generator().manual_seed(seed)
        votes = self.votes(prompts, first, second)
        uniforms = torch.rand(votes.shape, generator=generator, dtype=torch.float64, device="cpu")
        return (uniforms < votes).sum(1) >= 2

    def _score(self, prompt: str, response: str) -> tuple[float, ...]:
        key = prompt, response
        if key not in self._scores:
            if prompt not in self.truths:
                raise ValueError(f"annotators: prompts: expected one whose first line is known; got {prompt[:60]!r}")
            tokens = words(response)
            self._scores[key] = (
                (
                    coverage(self.truths[prompt], response),
                    -float(max(len(tokens), SHORTEST)),
                    self.language.mean_log_probability(response),
                )
                if any(token.isalnum() for token in tokens)
                else (_NOTHING,) * 3
            )
        return self._scores[key]


def majority(votes: torch.Tensor) -> torch.Tensor:  # (..., 3) -> (...)
    """Return P(at least two of three independent votes are for the first)."""
    a, b, c = votes.unbind(-1)
    return (a * b + a * c + b * c - 2 * a * b * c).clamp(0, 1)  # rounding may leave the interval


def coverage(truth: str, response: str) -> float:
    """The share of the truth's character trigrams, with multiplicity, that the response has."""
    expected, present = _trigrams(truth), _trigrams(response)
    return sum((expected & present).values()) / max(sum(expected.values()), 1)


def _trigrams(text: str) -> Counter[str]:
    plain = f" {' '.join(words(text))} "
    return Counter(plain[i : i + 3] for i in range(len(plain) - 2))


def common_scales(scores: torch.Tensor, share: float) -> list[float]:  # (prompts, responses, 3)
    """Return, for each criterion, `share` times the root mean square difference of two responses' scores."""
    scores = scores.masked_fill(scores <= _NOTHING, torch.nan)
    pairs = [scores[:, i] - scores[:, j] for i, j in combinations(range(scores.shape[1]), 2)]
    differences = torch.stack(pairs).flatten(0, 1)
    spread = (differences**2).nanmean(0).sqrt().nan_to_num()
    return [max(share * float(value), 1e-3) for value in spread]


def words(text: str) -> list[str]:
    """Split a text into words and punctuation marks, in lower case."""
    return TOKEN.findall(text.lower())


class Trigrams:
    """A trigram model of words, interpolated with its lower orders.

    p_0(w) = 1 / V and p_k(w | h) = a_k f(w | h) + (1 - a_k) p_(k-1)(w | h without its first word), where f is the
    frequency of w after the k - 1 words h; a_k = 0 where h does not occur.

    Args:
        texts (iterable of texts): counted once each; at least one.
    """

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
        """The mean log-probability of the text's words and its end, in nats per word.

        Args:
            text (str): without words, its end alone.
        """
        row = [_START, _START, *words(text), _END]
        return sum(math.log(self._probability(row[i - 2 : i + 1])) for i in range(2, len(row))) / (len(row) - 2)

    def _probability(self, gram: list[str]) -> float:
        value = 1 / self.vocabulary
        for order, trust in enumerate(self.TRUST):
            key = tuple(gram[2 - order :])
            count = self.histories[order][key[:-1]]
            if count:
                value = trust * self.counts[order][key] / count + (1 - trust) * value
        return value
