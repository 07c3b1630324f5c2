"""Shared weights: LoRA over the reference itself, and an opponent of averaged parameters."""

from __future__ import annotations

import copy

import pytest
import torch

from nlhf_kernels.engine import Player, RolloutEngine, nash_ema, nash_md
from tests.support.engine import settings, tiny, tiny_pair, worst_error
from tests.support.recorder import recorded
from tests.support.tiny_models import BETA, one_thread, padded, prompts


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def adapted(base: torch.nn.Module, targets=("q_proj", "v_proj", "down_proj"), **options) -> torch.nn.Module:
    """Return a model with an adapter whose update is as large as the weights."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, target_modules=list(targets), **options)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def test_one_pass_serves_the_adapter_and_its_base() -> None:
    base = tiny("llama")
    policy = adapted(base)
    engine = RolloutEngine(policy)
    assert engine.models.one_pass
    calls = []
    policy.get_base_model().register_forward_pre_hook(lambda *_: calls.append(1))
    rows = prompts()
    result = engine.rollout(**padded(rows), players=nash_md(BETA, samples=2), settings=settings(8))
    assert len(calls) == 8, "one forward a step, for both models"
    merged = copy.deepcopy(policy).merge_and_unload()
    for responses, beta in zip(result, (0.0, BETA), strict=True):
        assert worst_error(responses, merged, base, rows, beta, samples=2) < 5e-5
    difference = result[0].policy_logprobs - result[0].reference_logprobs
    assert difference.abs().max() > 0.1, "the adapter must matter"


def test_the_reference_is_the_base_to_the_last_bit() -> None:
    """|log mu - log mu_true| = 0: at beta 1 samples follow the reference alone, and an adapter of zeros is the base."""
    policy = adapted(tiny("llama"))
    players = (Player(1.0, stream=1, samples=2),)
    trained = RolloutEngine(policy).rollout(**padded(prompts()), players=players, settings=settings(8))[0]
    for name, parameter in policy.named_parameters():
        if "lora" in name:
            parameter.data.zero_()
    base = RolloutEngine(policy).rollout(**padded(prompts()), players=players, settings=settings(8))[0]
    assert torch.equal(trained.tokens, base.tokens)
    assert torch.equal(trained.reference_logprobs, base.reference_logprobs)
    torch.testing.assert_close(base.reference_logprobs, base.policy_logprobs)
    assert not torch.equal(trained.policy_logprobs, base.policy_logprobs)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_dora": True}, "LoRA variant"),
        ({"targets": ["q_proj", "embed_tokens"]}, "no plain LoRA of a linear layer"),
    ],
)
def test_adapters_that_are_more_than_a_sum_take_two_passes(options, reason) -> None:
    base = tiny("llama")
    policy = adapted(base, **options)
    flags = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
    rows = prompts()
    result = RolloutEngine(policy).rollout(**padded(rows), players=nash_md(BETA), settings=settings(6))
    assert any(reason in note for note in result.notes)
    merged = copy.deepcopy(policy).merge_and_unload()
    assert worst_error(result[1], merged, base, rows, BETA) < 5e-5
    assert flags == {name: parameter.requires_grad for name, parameter in policy.named_parameters()}


def test_rows_leave_a_shared_batch() -> None:
    base = tiny("llama")
    policy, rows = adapted(base), prompts((1, 6, 9, 3, 5))
    engine = RolloutEngine(policy)
    free, _ = engine.rollout(**padded(rows), players=nash_md(BETA), settings=settings(30))
    ends = [int(free.tokens[0, 2]), int(free.tokens[1, 9])]
    result = engine.rollout(**padded(rows), players=nash_md(BETA), settings=settings(30, end_ids=ends))
    assert result.row_steps < 10 * result.steps
    merged = copy.deepcopy(policy).merge_and_unload()
    for responses, beta in zip(result, (0.0, BETA), strict=True):
        assert worst_error(responses, merged, base, rows, beta) < 5e-5


def test_a_merged_adapter_hides_its_base_and_is_refused() -> None:
    policy = adapted(tiny("llama"))
    policy.merge_adapter()
    with pytest.raises(ValueError, match="policy: expected an adapter beside the base's weights; got one merged"):
        RolloutEngine(policy)


def test_adapters_that_change_after_the_engine_was_made_are_noticed() -> None:
    policy, request = adapted(tiny("llama")), {**padded(prompts()), "players": nash_md(BETA), "settings": settings(3)}
    engine = RolloutEngine(policy)
    policy.merge_adapter()
    with pytest.raises(ValueError, match="got one merged into them"):
        engine.rollout(**request)
    policy.unmerge_adapter()
    assert engine.rollout(**request).steps == 3
    peft = pytest.importorskip("peft")
    policy.add_adapter("dora", peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match="expected adapters as when the engine was made; now a LoRA variant"):
        engine.rollout(**request)


def test_the_adapter_that_acts_is_part_of_what_is_recorded() -> None:
    peft = pytest.importorskip("peft")
    policy = adapted(tiny("llama"))
    policy.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    engine, recorder = recorded(policy, None, bucket=32)
    for adapter, records in (("default", 1), ("other", 2), ("default", 2)):
        policy.set_adapter(adapter)
        engine.rollout(**padded(prompts()), players=nash_md(BETA), settings=settings(3))
        assert recorder.records == records


def test_biases_of_the_base_that_are_trained_are_refused() -> None:
    """Trained biases of the base are refused: peft keeps them when the adapter is off, which changes the reference."""
    with pytest.raises(ValueError, match="leaves its base as it is, .*; got bias='all' in 'default'"):
        RolloutEngine(adapted(tiny("qwen2"), bias="all"))


def test_layers_have_their_own_forward_again() -> None:
    policy = adapted(tiny("llama"))
    engine = RolloutEngine(policy)

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    handle = policy.get_base_model().lm_head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.rollout(**padded(prompts()), players=nash_md(BETA), settings=settings(3))
    handle.remove()
    assert not any("forward" in vars(module) for module in policy.modules())
    assert engine.rollout(**padded(prompts()), players=nash_md(BETA), settings=settings(3)).steps == 3


# ---- a third set of parameters ---------------------------------------------------------------------------------------


def test_an_average_of_parameters_samples_y_prime() -> None:
    policy, reference = tiny_pair("qwen2")
    average = {name: value.detach() + 0.2 * torch.randn_like(value) for name, value in policy.named_parameters()}
    engine = RolloutEngine(policy, reference, opponent=average)
    rows = prompts()
    for _ in range(2):
        opponent = copy.deepcopy(policy)
        opponent.load_state_dict(average, strict=False)
        y, other = engine.rollout(**padded(rows), players=nash_ema(BETA), settings=settings(6))
        assert worst_error(y, policy, reference, rows, 0.0) < 5e-5
        assert worst_error(other, opponent, reference, rows, BETA) < 5e-5
        for value in average.values():
            value.mul_(0.9)  # updated in place: the next rollout reads it, without a copy


def test_only_the_models_of_the_players_run() -> None:
    policy, reference = tiny_pair("gpt2")
    engine = RolloutEngine(policy, reference, opponent=tiny("gpt2", seed=7))
    shapes = []
    policy.register_forward_pre_hook(lambda m, a, k: shapes.append(len(k["input_ids"])), with_kwargs=True)
    engine.rollout(**padded(prompts()), players=nash_ema(BETA, samples=2), settings=settings(3))
    assert shapes == [3, 6, 6], "the policy reads the rows of y only"


def test_an_average_of_the_adapter_alone() -> None:
    base = tiny("llama")
    policy = adapted(base)
    average = {name: 0.5 * value.detach() for name, value in policy.named_parameters() if "lora" in name}
    engine = RolloutEngine(policy, opponent=average)
    rows = prompts()
    _, other = engine.rollout(**padded(rows), players=nash_ema(BETA), settings=settings(6))
    opponent = copy.deepcopy(policy)
    opponent.load_state_dict(average, strict=False)
    assert worst_error(other, opponent.merge_and_unload(), base, rows, BETA) < 5e-5


def test_parameters_that_do_not_fit_are_refused() -> None:
    policy, reference = tiny_pair("gpt2")
    parameters = {name: value.detach() for name, value in policy.named_parameters()}
    first = next(iter(parameters))
    for wrong, message in (
        (
            {**parameters, "no.such": parameters[first]},
            "opponent: expected names of the policy's parameters; got 'no.such'",
        ),
        (
            {name: parameters[name] for name in list(parameters)[1:]},
            "opponent: expected every trained parameter; .* is missing",
        ),
        ({**parameters, first: parameters[first][:1]}, "opponent: transformer.wte.weight: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            RolloutEngine(policy, reference, opponent=wrong)
