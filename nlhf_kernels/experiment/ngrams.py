"""A trigram model of words: what the annotator of fluency knows of the language."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable

TOKEN = re.compile(r"\w+|[^\w\s]")
_START, _END = "<s>", "</s>"


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
