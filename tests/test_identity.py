"""Identities: which differences between objects they distinguish, and which they ignore."""

from __future__ import annotations

import functools

import torch

from nlhf_kernels.core.identity import describe, weights_digest
from nlhf_kernels.preference import AverageJudge, PreferenceModelJudge, RewardJudge, RewardModel, checked
from tests.support.preference import comparison_model


def half(prompts, first, second):
    return [0.5 for _ in prompts]


def other_half(prompts, first, second):
    return [0.5 for _ in prompts]


class Service:
    def __init__(self, identity: str) -> None:
        self.identity = identity

    def __call__(self, prompts, first, second):
        return [0.5 for _ in prompts]


def test_weights_by_every_byte_and_name() -> None:
    weights = {"a": torch.arange(6.0), "b": torch.ones(2, 3, dtype=torch.bfloat16)}
    digest = weights_digest(weights.items())
    assert digest == weights_digest(reversed([(name, value.clone()) for name, value in weights.items()]))
    flipped = weights["a"].clone()
    flipped.view(torch.int32)[3] ^= 1
    for change in ({"a": flipped}, {"a": weights["a"].view(2, 3)}, {"a": weights["a"].double()}):
        assert weights_digest({**weights, **change}.items()) != digest
    assert weights_digest([("c", weights["a"]), ("b", weights["b"])]) != digest
    assert weights_digest([]) == weights_digest([])


def test_judges_by_what_they_answer_with() -> None:
    model, reward = comparison_model(), comparison_model(RewardModel)
    judges = [
        half, other_half, lambda prompts, *both: half(prompts, *both), functools.partial(half, second=[]),
        Service("gpt of May"), Service("gpt of June"), PreferenceModelJudge(model), RewardJudge(reward),
        RewardJudge(reward, scale=2.0), AverageJudge([half, other_half]), AverageJudge([half, other_half], [1, 3]),
        reward.rewards,
    ]  # fmt: skip
    descriptions = [describe(judge) for judge in judges]
    assert len(set(descriptions)) == len(descriptions) and descriptions == [describe(judge) for judge in judges]
    assert describe(checked(half, "a name")) == describe(half)
    assert describe(PreferenceModelJudge(model, batch_size=2)) == describe(PreferenceModelJudge(model))
    with torch.no_grad():
        model.head.weight.add_(1e-3)
    assert describe(PreferenceModelJudge(model)) not in descriptions
