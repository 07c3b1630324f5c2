"""compile="auto": the decision by measured steps and rollouts to come, with a simulated clock, and what it changes."""

from __future__ import annotations

import itertools

import pytest
import torch

from nlhf_kernels.engine import RolloutEngine, compiling, engine, loop, nash_md
from nlhf_kernels.engine.compiling import CompileDecision
from tests.support.engine import settings, tiny_pair, worst_error
from tests.support.tiny_models import BETA, one_thread, padded, prompts

STEPS, STEP_S = 5, 0.25  # of a rollout; by the simulated clock


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture
def compilations(monkeypatch) -> list[torch.nn.Module]:
    """Let the CPU stand in for a GPU, steps take STEP_S, and compiling do nothing but be recorded."""
    models = []
    ticks = itertools.count(step=(STEPS - 1) * STEP_S)
    monkeypatch.setattr(engine, "COMPILED_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(loop, "clock", lambda: next(ticks))
    monkeypatch.setattr(torch, "compile", lambda model: models.append(model) or model)
    return models


def test_the_decision_counts_what_is_saved_against_what_it_costs() -> None:
    decision = CompileDecision(layers=48)
    assert decision.cost == 48.0 and not decision.repays(10**9), "no step has been timed"
    decision.record(0.0, 0)  # a rollout of one token
    assert not decision.repays(10**9)
    decision.record(1.0, 100)  # records graphs
    decision.record(0.2, 100)
    decision.record(0.9, 100)
    assert decision.seconds_per_step == 0.002
    assert not decision.repays(119_999) and decision.repays(120_001)
    assert str(decision) == "2.00 ms each; compiling takes about 48 s"


def test_compiled_from_the_rollout_on_that_repays_it(compilations) -> None:
    policy, reference = tiny_pair("llama")
    rows = prompts()
    compiled = RolloutEngine(policy, reference, compile="auto", bucket=16)
    layers = 2 * policy.config.num_hidden_layers
    needed = compiling.COMPILATIONS * compiling.SECONDS_PER_LAYER * layers / (compiling.SAVED_SHARE * STEP_S * STEPS)

    def rollout(to_come: float):
        compiled.rollouts_to_come = to_come
        return compiled.rollout(**padded(rows), players=nash_md(BETA), settings=settings(STEPS))

    first = rollout(1000 * needed)
    assert compilations == [], "its steps have not been timed yet"
    rollout(int(needed))
    assert compilations == [], "too few are to come"
    again = rollout(int(needed) + 1)
    assert compilations == [policy, reference]
    assert set(compiled.models.compiled) == {"policy", "reference"} and compiled.models.fused_layers is None
    assert all(runner.static_forward is not None for runner in compiled._space.runners)
    rollout(1000 * needed)
    assert len(compilations) == 2, "once"
    for result in (first, again):
        assert result.notes == ()
        for responses, beta in zip(result, (0.0, BETA), strict=True):
            assert worst_error(responses, policy, reference, rows, beta) < 5e-5


def test_a_compilers_error_ends_no_run(compilations, monkeypatch) -> None:
    """The first rollout that compiles takes uncompiled steps if that fails; other errors are raised."""
    policy, reference = tiny_pair("llama")
    compiled, rows = RolloutEngine(policy, reference, compile="auto", bucket=16), prompts()
    ask = lambda: compiled.rollout(**padded(rows), players=nash_md(BETA), settings=settings(STEPS))  # noqa: E731
    first = ask()
    before, compiled.rollouts_to_come = compiled.models.fused_layers, 10**6

    def fails(**inputs):
        raise RuntimeError("no C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", lambda model: fails)
    for result in (ask(), ask()):
        assert result.notes == ("not compiled: RuntimeError: no C++ compiler found",)
        assert torch.equal(result[0].tokens, first[0].tokens)
    assert compiled.models.compiled == {} and compiled.models.fused_layers is before

    def broken(*arguments, **options):
        raise RuntimeError("another cause")

    again = RolloutEngine(policy, reference, compile="auto", bucket=16)
    again.rollout(**padded(rows), players=nash_md(BETA), settings=settings(STEPS))
    again.rollouts_to_come = 10**6
    monkeypatch.setattr(policy.model.norm, "forward", broken)
    with pytest.raises(RuntimeError, match="another cause"):
        again.rollout(**padded(rows), players=nash_md(BETA), settings=settings(STEPS))


def test_eager_steps_are_not_compiled(compilations) -> None:
    compiled = RolloutEngine(*tiny_pair("llama"), compile="auto", bucket=16)
    ask = lambda: compiled.rollout(**padded(prompts()), players=nash_md(BETA), settings=settings(STEPS))  # noqa: E731
    ask()
    compiled.rollouts_to_come = 10**6
    compiled.models.why_not_recorded = lambda: ["a test says so"]
    assert ask().notes == ("eager steps: a test says so",) and compilations == []


def test_on_a_cpu_auto_says_that_it_does_not_compile() -> None:
    compiled = RolloutEngine(*tiny_pair("llama"), compile="auto")
    result = compiled.rollout(**padded(prompts()), players=nash_md(BETA), settings=settings(2))
    assert result.notes == ("not compiled: what it saves is known on cuda; the models are on cpu",)
    assert compiled.graphs is None
    with pytest.raises(ValueError, match="compile: expected auto, True or False; got 'yes'"):
        RolloutEngine(*tiny_pair("llama"), compile="yes")
