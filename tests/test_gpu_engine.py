"""Rollouts on a GPU: captured graphs against eager steps and full forward passes."""

from __future__ import annotations

import pytest
import torch

from nlhf_kernels.engine import RolloutEngine, nash_md
from tests.support.engine import settings, tiny_pair, worst_error
from tests.support.tiny_models import BETA, padded, prompts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def models():
    return lambda architecture: tuple(model.cuda() for model in tiny_pair(architecture))


def _batch(rows) -> dict:
    return {name: value.cuda() for name, value in padded(rows).items()}


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mistral", "gemma3", "bloom"])
def test_captured_steps_say_what_full_forward_passes_say(architecture, models) -> None:
    policy, reference = models(architecture)
    rows = prompts()
    engine = RolloutEngine(policy, reference, bucket=8)
    result = engine.rollout(**_batch(rows), players=nash_md(BETA), settings=settings(12))
    assert result.notes == () and len(engine.graphs.recorded) == 2
    for responses, beta in zip(result, (0.0, BETA), strict=True):
        assert worst_error(responses, policy, reference, [row.cuda() for row in rows], beta) < 1e-3


def test_captured_steps_advance_their_noise_and_agree_with_eager_ones(models) -> None:
    policy, reference = models("llama")
    rows = _batch(prompts((1, 6, 9, 3, 5)))
    captured = RolloutEngine(policy, reference, bucket=32)
    eager = RolloutEngine(policy, reference, graphs=False)
    asked = settings(40, end_ids=(5, 6, 7))
    for _ in range(2):  # the second replays what the first captured
        one = captured.rollout(**rows, players=nash_md(BETA), settings=asked)
        two = eager.rollout(**rows, players=nash_md(BETA), settings=asked)
        assert two.notes == ("eager steps: graphs=False was asked for",)
        for first, second in zip(one, two, strict=True):
            assert torch.equal(first.tokens, second.tokens)
    assert len(set(one[0].tokens[0].tolist())) > 1


def test_no_step_waits_for_the_device(models) -> None:
    policy, reference = models("llama")
    engine = RolloutEngine(policy, reference)
    request = {**_batch(prompts()), "players": nash_md(BETA), "settings": settings(30)}
    engine.rollout(**request)
    rollout_step = engine.graphs.run

    watched_steps = []

    def watched(*arguments) -> None:
        watched_steps.append(None)
        torch.cuda.set_sync_debug_mode("error")
        try:
            rollout_step(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    engine.graphs.run = watched
    result = engine.rollout(**request)
    assert len(watched_steps) == 29 and all(responses.ok.all() for responses in result)
