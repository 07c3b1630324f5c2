"""Rollouts against full forward passes, transformers' own decoding, and the exact mixture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from nlhf_kernels.engine import Player, RolloutEngine, RolloutSettings, nash_md
from tests.support.engine import TINY, settings, tiny, tiny_pair, worst_error
from tests.support.statistics import assert_plausible, chi_square_p
from tests.support.tiny_models import BETA, VOCABULARY, one_thread, padded, prompts, teacher_forced

every_architecture = pytest.mark.parametrize("architecture", TINY)


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@every_architecture
def test_logprobs_are_those_of_full_forward_passes(architecture) -> None:
    """Log-probabilities of y and y' of padded prompts, two samples each, are exact ten tokens past a window of four."""
    policy, reference = tiny_pair(architecture)
    rows = prompts()
    result = RolloutEngine(policy, reference).rollout(
        **padded(rows), players=nash_md(BETA, samples=2), settings=settings(10)
    )
    for responses, beta in zip(result, (0.0, BETA), strict=True):
        assert responses.tokens.shape == (6, 10) and responses.ok.all() and responses.mask.all()
        assert worst_error(responses, policy, reference, rows, beta, samples=2) < 5e-5


@every_architecture
def test_greedy_tokens_are_transformers_own(architecture) -> None:
    policy, reference = tiny_pair(architecture)
    batch = padded(prompts())
    players = (Player(0.0), Player(1.0, stream=1))
    result = RolloutEngine(policy, reference).rollout(**batch, players=players, settings=settings(8, temperature=0.0))
    for responses, model in zip(result, (policy, reference), strict=True):
        expected = model.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert torch.equal(responses.tokens, expected[:, batch["input_ids"].shape[1] :])


@pytest.mark.parametrize("beta", [0.0, BETA, 1.0, -0.5])
def test_tokens_are_distributed_as_the_exact_mixture(beta) -> None:
    """The first token, and the second given the first, follow the exact mixture: 4,000 draws each; `assert_plausible`
    states the false alarm rate."""
    policy, reference = tiny_pair("llama")
    (prompt,) = prompts((5,))
    player = Player(beta, stream=1, samples=4000)
    (responses,) = RolloutEngine(policy, reference).rollout(prompt[None], None, (player,), settings(2))

    def exact(text: torch.Tensor) -> np.ndarray:
        one, two = (teacher_forced(model, text, text[:1])[0] for model in (policy, reference))
        return ((1 - beta) * one + beta * two).softmax(-1).numpy()

    first, second = responses.tokens.numpy().T
    assert_plausible(chi_square_p(np.bincount(first, minlength=VOCABULARY), exact(prompt)), "first token")
    likeliest = np.bincount(first).argmax()
    counts = np.bincount(second[first == likeliest], minlength=VOCABULARY)
    prefix = torch.cat([prompt, torch.tensor([likeliest])])
    assert_plausible(chi_square_p(counts, exact(prefix)), "second token")


def test_y_and_y_prime_are_independent() -> None:
    """At beta 0 y and y' agree as often as independent draws from the policy; with shared noise they would be equal."""
    policy, reference = tiny_pair("llama")
    (prompt,) = prompts((5,))
    y, other = RolloutEngine(policy, reference).rollout(prompt[None], None, nash_md(0.0, samples=2000), settings(1))
    p = teacher_forced(policy, prompt, prompt[:1])[0].exp()
    expected, agree = float((p**2).sum()), float((y.tokens == other.tokens).float().mean())
    assert abs(agree - expected) < 5 * (expected / 2000) ** 0.5  # five standard deviations: 6e-7


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mistral", "gemma3", "bloom"])
def test_rows_do_not_depend_on_batch_padding_or_compaction(architecture) -> None:
    policy, reference = tiny_pair(architecture)
    rows = prompts((1, 6, 9, 3, 5))
    engine = RolloutEngine(policy, reference)
    free, _ = engine.rollout(**padded(rows), players=nash_md(BETA), settings=settings(40))
    ends = sorted({int(free.tokens[0, 2]), int(free.tokens[1, 9]), int(free.tokens[2, 20])})
    together = engine.rollout(**padded(rows), players=nash_md(BETA), settings=settings(40, end_ids=ends))
    assert together.row_steps < 10 * together.steps, "rows that end must leave"
    for row, prompt in enumerate(rows):
        players = nash_md(BETA, row_ids=torch.tensor([row]))
        alone = engine.rollout(prompt[None], None, players, settings(40, end_ids=ends))
        for one, many in zip(alone, together, strict=True):
            length = int(one.lengths[0])
            assert int(many.lengths[row]) == length and one.finish_reasons[0] == many.finish_reasons[row]
            assert torch.equal(one.tokens[0, :length], many.tokens[row, :length])
            torch.testing.assert_close(
                one.mixture_logprobs[0, :length], many.mixture_logprobs[row, :length], rtol=0, atol=1e-4
            )


def test_the_prompt_is_read_once_per_model() -> None:
    policy, reference = tiny_pair("llama")
    shapes = []
    policy.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    engine = RolloutEngine(policy, reference)
    shapes.clear()
    engine.rollout(**padded(prompts()), players=nash_md(BETA, samples=3), settings=settings(3))
    assert shapes == [(3, 9), (18, 1), (18, 1)]


def test_an_engine_serves_many_rollouts_and_trained_weights() -> None:
    """Rollouts reuse the cache's storage; the contents that a larger rollout left there have no effect."""
    policy, reference = tiny_pair("llama")
    engine = RolloutEngine(policy, reference)
    engine.rollout(**padded(prompts((9, 9, 9, 9))), players=nash_md(BETA), settings=settings(12))
    space = engine._space
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.5)
    rows = prompts((2, 4))
    result = engine.rollout(**padded(rows), players=nash_md(BETA), settings=settings(6))
    assert engine._space is space
    assert worst_error(result[1], policy, reference, rows, BETA) < 5e-5


def test_a_prompt_of_one_token_and_ends_in_the_prompt() -> None:
    policy, reference = tiny_pair("gpt2")
    rows = [torch.tensor([5]), torch.tensor([2, 7, 2])]
    result = RolloutEngine(policy, reference).rollout(
        **padded(rows), players=nash_md(BETA), settings=settings(5, end_ids=(96,))
    )
    assert worst_error(result[0], policy, reference, rows, 0.0) < 5e-5


def test_low_precision_is_as_exact_as_its_dtype() -> None:
    policy, reference = (model.bfloat16() for model in tiny_pair("llama"))
    rows = prompts()
    result = RolloutEngine(policy, reference).rollout(**padded(rows), players=nash_md(BETA), settings=settings(8))
    assert 1e-4 < worst_error(result[1], policy, reference, rows, BETA) < 0.25


def test_policy_alone() -> None:
    policy, _ = tiny_pair("gpt2")
    (alone,) = RolloutEngine(policy).rollout(**padded(prompts()), players=(Player(),), settings=settings(4))
    assert alone.reference_logprobs is None
    torch.testing.assert_close(alone.policy_logprobs, alone.mixture_logprobs)


def test_models_without_keys_and_values_read_the_whole_text_or_are_refused() -> None:
    mamba = tiny("mamba")
    with pytest.raises(ValueError, match="policy: expected a model whose past lies in keys and values; Mamba"):
        RolloutEngine(mamba)
    rows = prompts((6, 6))
    (result,) = RolloutEngine(mamba, use_cache=False).rollout(**padded(rows), players=(Player(),), settings=settings(6))
    assert worst_error(result, mamba, None, rows, 0.0) < 5e-5


def test_the_settings_of_the_sampler_arrive() -> None:
    policy, reference = tiny_pair("llama")
    (prompt,) = prompts((5,))
    options = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01}
    player = Player(BETA, stream=1, samples=200)
    (responses,) = RolloutEngine(policy, reference).rollout(prompt[None], None, (player,), settings(1, **options))
    one, two = (teacher_forced(model, prompt, prompt[:1])[0] for model in (policy, reference))
    scores = ((1 - BETA) * one + BETA * two)[None]
    for warper in (
        transformers.TemperatureLogitsWarper(0.7), transformers.TopKLogitsWarper(20),
        transformers.TopPLogitsWarper(0.9), transformers.MinPLogitsWarper(0.01),
    ):  # fmt: skip
        scores = warper(None, scores)
    expected = scores.log_softmax(-1)[0, responses.tokens[:, 0]].float()
    torch.testing.assert_close(responses.mixture_logprobs[:, 0], expected, rtol=0, atol=2e-5)


def test_seeds() -> None:
    policy, reference = tiny_pair("gpt2")
    engine = RolloutEngine(policy, reference)

    def drawn(**options) -> list:
        result = engine.rollout(
            **padded(prompts()), players=nash_md(BETA), settings=RolloutSettings(8, end_ids=(), **options)
        )
        return [result.seed, *(responses.tokens.tolist() for responses in result)]

    first = drawn(seed=1)
    assert first == drawn(seed=1) != drawn(seed=2)
    free = drawn()
    assert free == drawn(seed=free[0])
