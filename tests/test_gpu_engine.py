"""Rollouts on a GPU: captured graphs against eager steps and full forward passes."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

from benchmarks.harness.case import Shape
from benchmarks.rollout import make
from nlhf_kernels.engine import RolloutEngine, nash_md
from tests.support.engine import can_be_recorded, settings, tiny, tiny_pair, worst_error
from tests.support.gpu import nothing_waits
from tests.support.tiny_models import BETA, padded, prompts
from tests.test_engine_shared import adapted

pytestmark = pytest.mark.gpu


@pytest.fixture
def models():
    return lambda architecture: tuple(model.cuda() for model in tiny_pair(architecture))


def _batch(rows) -> dict:
    return {name: value.cuda() for name, value in padded(rows).items()}


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen3", "mistral", "gemma3", "bloom"])
def test_captured_steps_give_the_logits_of_eager_steps_and_full_forward_passes(architecture, models) -> None:
    policy, reference = models(architecture)
    rows = prompts()
    engine = RolloutEngine(policy, reference, bucket=8, graphs="steps")
    result = engine.rollout(**_batch(rows), players=nash_md(BETA), settings=settings(12))
    recorded = can_be_recorded(policy)
    assert (result.notes == ()) is recorded and len(engine.graphs.recorded) == 2 * recorded
    eager = RolloutEngine(policy, reference, graphs=False)
    for responses, plain, beta in zip(
        result, eager.rollout(**_batch(rows), players=nash_md(BETA), settings=settings(12)), (0.0, BETA), strict=True
    ):
        assert torch.equal(responses.tokens, plain.tokens)
        for got in (responses, plain):
            assert worst_error(got, policy, reference, [row.cuda() for row in rows], beta) < 1e-3


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma3"])
def test_captured_passes_give_the_logits_of_full_forward_passes(architecture, models) -> None:
    """The pass of a shape is recorded when it comes a second time, and replayed over other prompts and weights."""
    policy, reference = models(architecture)
    engine = RolloutEngine(policy, reference)
    plain = RolloutEngine(policy, reference, graphs="steps")
    batches = ((1, 6, 9), 0), ((1, 6, 9), 1), ((40, 64, 3), 1), ((70, 2), 1), ((70, 2), 2), ((9, 9, 1), 2)
    for lengths, passes in batches:
        rows = prompts(lengths)
        request = {**_batch(rows), "players": nash_md(BETA), "settings": settings(12)}
        result, expected = engine.rollout(**request), plain.rollout(**request)
        assert result.notes == () and len(engine.graphs.recorded_passes) == passes
        for responses, other, beta in zip(result, expected, (0.0, BETA), strict=True):
            assert torch.equal(responses.tokens, other.tokens)
            assert worst_error(responses, policy, reference, [row.cuda() for row in rows], beta) < 1e-3
        for parameter in policy.parameters():
            parameter.data.mul_(1.02)


def test_captured_passes_without_padding_say_the_same_as_those_before_them(models) -> None:
    policy, reference = models("llama")
    engine = RolloutEngine(policy, reference, bucket=64)
    for _ in range(2):
        for lengths in ((64, 64), (64, 63)):
            rows = prompts(lengths)
            result = engine.rollout(**_batch(rows), players=nash_md(BETA), settings=settings(4))
            for responses, beta in zip(result, (0.0, BETA), strict=True):
                assert worst_error(responses, policy, reference, [row.cuda() for row in rows], beta) < 1e-3
    assert len(engine.graphs.recorded_passes) == 2


def test_a_captured_pass_does_not_wait_for_the_device(models) -> None:
    engine = RolloutEngine(*models("llama"))
    request = {**_batch(prompts()), "players": nash_md(BETA), "settings": settings(3)}
    for _ in range(2):
        engine.rollout(**request)
    run_pass, watched_passes = engine.graphs.run_pass, []

    def watched(*arguments) -> None:
        watched_passes.append(None)
        with nothing_waits():
            run_pass(*arguments)

    engine.graphs.run_pass = watched
    assert all(responses.ok.all() for responses in engine.rollout(**request)) and len(watched_passes) == 1


def test_compiled_steps_give_the_logits_of_full_forward_passes(models) -> None:
    policy, reference = models("llama")
    rows = prompts()
    engine = RolloutEngine(policy, reference, compile=True, bucket=32)
    result = engine.rollout(**_batch(rows), players=nash_md(BETA), settings=settings(12))
    assert result.notes == () and len(engine.graphs.recorded) == 1
    for responses, beta in zip(result, (0.0, BETA), strict=True):
        assert worst_error(responses, policy, reference, [row.cuda() for row in rows], beta) < 1e-3


@pytest.mark.parametrize("fused", [False, "products", "layers", True])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_fused_steps_give_the_logits_of_full_forward_passes(architecture, fused, models) -> None:
    policy, reference = models(architecture)
    rows = prompts()
    engine = RolloutEngine(policy, reference, bucket=32, fused=fused)
    assert bool(engine.models.joint_products.groups) is (fused in (True, "products"))
    assert bool(engine.models.fused_layers and engine.models.fused_layers.forwards) is (fused in (True, "layers"))
    for _ in range(2):  # the second pass replays the captured graphs with changed weights
        result = engine.rollout(**_batch(rows), players=nash_md(BETA), settings=settings(12))
        assert result.notes == () and len(engine.graphs.recorded) == 1
        for responses, beta in zip(result, (0.0, BETA), strict=True):
            assert worst_error(responses, policy, reference, [row.cuda() for row in rows], beta) < 1e-3
        for parameter in policy.parameters():
            parameter.data.mul_(1.05)


def test_products_of_few_rows_give_the_logits_of_full_forward_passes(models) -> None:
    policy, reference = models("qwen2")
    rows = prompts()
    engine = RolloutEngine(policy, reference, bucket=32, linear=True)
    result = engine.rollout(**_batch(rows), players=nash_md(BETA), settings=settings(12))
    assert engine.models.step_products.forwards and result.notes == () and len(engine.graphs.recorded) == 1
    for responses, beta in zip(result, (0.0, BETA), strict=True):
        assert worst_error(responses, policy, reference, [row.cuda() for row in rows], beta) < 1e-3


@pytest.mark.parametrize("options", [{"fused": False}, {}, {"linear": True}], ids=str)
@pytest.mark.parametrize("architecture", ["gpt2", "qwen2", "qwen3"])
def test_two_models_in_one_captured_pass(architecture, options) -> None:
    policy, reference = (tiny(architecture, seed=seed).cuda() for seed in (1, 2))
    rows = prompts()
    engine = RolloutEngine(policy, reference, bucket=32, one_pass=True, **options)
    for _ in range(2):  # the second pass replays the captured graphs with changed weights
        result = engine.rollout(**_batch(rows), players=nash_md(BETA, samples=2), settings=settings(12))
        assert result.notes == () and len(engine.graphs.recorded) == 1 and engine.models.active_pair is not None
        for responses, beta in zip(result, (0.0, BETA), strict=True):
            assert worst_error(responses, policy, reference, [row.cuda() for row in rows], beta, samples=2) < 1e-3
        for parameter in policy.parameters():
            parameter.data.mul_(1.05)


def test_adapter_and_base_in_one_captured_pass() -> None:
    base = tiny("llama").cuda()
    policy = adapted(tiny("llama")).cuda()
    engine, rows = RolloutEngine(policy), prompts()
    result = engine.rollout(**_batch(rows), players=nash_md(BETA, samples=2), settings=settings(12))
    result = engine.rollout(**_batch(rows), players=nash_md(BETA, samples=2), settings=settings(12))  # records the pass
    assert engine.models.one_pass and engine.graphs.recorded and result.notes == ()
    assert engine.graphs.recorded_passes
    merged = copy.deepcopy(policy).merge_and_unload()
    for responses, beta in zip(result, (0.0, BETA), strict=True):
        assert worst_error(responses, merged, base, [row.cuda() for row in rows], beta, samples=2) < 1e-3
    assert (result[0].policy_logprobs - result[0].reference_logprobs).abs().max() > 0.1, "the adapter matters"


def test_rows_that_have_ended_leave_captured_steps(models) -> None:
    policy, reference = models("llama")
    rows = _batch(prompts((1, 6, 9, 3, 5)))
    engine = RolloutEngine(policy, reference, bucket=32)
    free = engine.rollout(**rows, players=nash_md(BETA), settings=settings(30))
    ends = [int(free[0].tokens[0, 2]), int(free[0].tokens[1, 9])]
    request = {**rows, "players": nash_md(BETA), "settings": settings(30, end_ids=ends)}
    result, eager = engine.rollout(**request), RolloutEngine(policy, reference, graphs=False).rollout(**request)
    assert result.row_steps < 10 * result.steps and len(engine.graphs.recorded) > 1, "graphs of several row counts"
    for first, second in zip(result, eager, strict=True):
        assert torch.equal(first.tokens, second.tokens) and torch.equal(first.lengths, second.lengths)


def test_captured_steps_advance_their_noise_and_agree_with_eager_ones(models) -> None:
    policy, reference = models("llama")
    rows = _batch(prompts((1, 6, 9, 3, 5)))
    captured = RolloutEngine(policy, reference, bucket=32)
    eager = RolloutEngine(policy, reference, graphs=False)
    rollout_settings = settings(40, end_ids=(5, 6, 7))
    for _ in range(2):  # the second pass replays the captured graphs
        one = captured.rollout(**rows, players=nash_md(BETA), settings=rollout_settings)
        two = eager.rollout(**rows, players=nash_md(BETA), settings=rollout_settings)
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
        with nothing_waits():
            rollout_step(*arguments)

    engine.graphs.run = watched
    result = engine.rollout(**request)
    assert len(watched_steps) == 29 and all(responses.ok.all() for responses in result)


def test_memory_is_what_was_planned() -> None:
    """Allocated memory is close to the plan, which omits activations and what graphs keep of them, and is freed."""
    pair = make(Shape({"prompts": 16, "prompt": 128, "new": 128, "width": 256, "layers": 2, "vocabulary": 151_936},
                      "bfloat16"), torch.device("cuda"))  # fmt: skip
    engine, rollout_settings = RolloutEngine(pair.policy, pair.reference), settings(pair.new)
    plan = engine.memory_plan(16, 128, nash_md(BETA), rollout_settings)
    engine.rollout(pair.ids, pair.mask, nash_md(BETA), rollout_settings)
    engine.release()  # what stays allocated is PyTorch's: cuBLAS has 32 MiB for each of the engine's streams
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    result = engine.rollout(pair.ids, pair.mask, nash_md(BETA), rollout_settings)
    allocated = torch.cuda.memory_allocated() - before
    assert result.steps == pair.new
    assert 0.5 * plan.total < allocated < 1.5 * plan.total + (64 << 20), f"allocated {allocated}; {plan}"
    reserved = torch.cuda.memory_reserved()
    engine.rollout(pair.ids, pair.mask, nash_md(BETA), rollout_settings)
    kept = torch.cuda.memory_reserved() - reserved  # by the pass over prompts, which is recorded now
    assert engine.graphs.recorded_passes and kept < 256 << 20, f"kept {kept}"
    engine.release()
    del result
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 16 << 20, "given back"
