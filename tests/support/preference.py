"""Tiny preference models, and preference rules: one that a reward can represent, one that no reward can."""

from __future__ import annotations

import random

import torch

from nlhf_kernels.data import Pair
from nlhf_kernels.preference import PairwisePreferenceModel, RewardModel
from tests.support.tiny_models import tiny_model, tiny_tokenizer

TEMPLATES = {PairwisePreferenceModel: "{prompt}|{first}|{second}=", RewardModel: "{prompt}|{response}="}


def comparison_model(kind=PairwisePreferenceModel, architecture: str = "llama", **options):
    """Make a model with a non-zero head, so that its preferences differ from 1/2 before training."""
    options = {"template": TEMPLATES[kind], **options}
    model = kind(tiny_model(architecture), tiny_tokenizer(), **options)
    model.head.weight.data.normal_(std=0.4, generator=torch.Generator().manual_seed(0))
    return model


def untrained(kind=PairwisePreferenceModel):
    return kind(tiny_model("llama"), tiny_tokenizer(), template=TEMPLATES[kind])


def word(draw: random.Random, length: int) -> str:
    return "".join(draw.choices("abcdefgh", k=length))


def shorter_wins(count: int, seed: int = 0) -> list[Pair]:
    draw = random.Random(seed)
    lengths = [sorted(draw.sample(range(1, 9), 2)) for _ in range(count)]
    return [Pair(word(draw, 3), word(draw, short), word(draw, long)) for short, long in lengths]


def rock_paper_scissors(triples: int, seed: int = 0) -> list[Pair]:
    """Make all three comparisons of three responses to each prompt; any reward gets at least one wrong."""
    draw = random.Random(seed)
    pairs = []
    for _ in range(triples):
        prompt, (r, p, s) = word(draw, 3), (first + word(draw, 2) for first in "RPS")
        pairs += [Pair(prompt, p, r), Pair(prompt, s, p), Pair(prompt, r, s)]
    return pairs
