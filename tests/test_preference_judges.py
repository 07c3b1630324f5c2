"""Judges: any callable is accepted, and errors name the judge, its values and the pair."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nlhf_kernels.preference import (
    AverageJudge,
    JudgeError,
    PreferenceModelJudge,
    RewardJudge,
    RewardModel,
    check_antisymmetry,
    checked,
)
from tests.support.preference import comparison_model, shorter_wins
from tests.support.tiny_models import one_thread

BATCH = (["p0", "p1", "p2"], ["a", "bb", "ccc"], ["dd", "d", "ddd"])


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def shorter(prompts, first, second):
    return [0.5 + 0.25 * ((len(a) < len(b)) - (len(a) > len(b))) for a, b in zip(first, second, strict=True)]


def answers(value):
    def oracle(prompts, first, second):
        return value

    return oracle


@pytest.mark.parametrize(
    "value",
    [
        [0, 0.25, 1],
        (False, 0.25, True),
        np.array([0, 0.25, 1], dtype=np.float32),
        torch.tensor([0, 0.25, 1], dtype=torch.bfloat16),
        torch.tensor([0, 0.25, 1], requires_grad=True),
        [torch.tensor(0.0), torch.tensor(0.25), torch.tensor(1.0)],
    ],
    ids=lambda value: type(value).__name__,
)
def test_answers_in_any_form_become_one(value) -> None:
    result = checked(answers(value))(*BATCH)
    assert result.tolist() == [0.0, 0.25, 1.0]
    assert result.dtype == torch.float64 and not result.requires_grad


WRONG = {
    "got nan for pair 1; pair 1: prompt 'p1', first 'bb', second 'd'": [0.1, math.nan, 0.2],
    "got 1.5 for pair 0, -0.1 for pair 2; pair 0: prompt 'p0'": [1.5, 0.5, -0.1],
    "expected 3 probabilities, one for each pair; got shape (2,), [0.5, 0.25]": [0.5, 0.25],
    "got shape (3, 1), [[0.5], [0.25], [0.75]]": torch.tensor([[0.5], [0.25], [0.75]]),
    "got shape (), 0.5": 0.5,
    "expected 3 probabilities; got NoneType None": None,
    "expected 3 probabilities; got list ['yes', 'no', 'no']": ["yes", "no", "no"],
    "expected 3 probabilities; got list [0.5, None, 0.5]": [0.5, None, 0.5],
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_answers_are_shown_and_kept(message) -> None:
    with pytest.raises(JudgeError) as error:
        checked(answers(WRONG[message]))(*BATCH)
    assert str(error.value).startswith("judge oracle: ") and message in str(error.value)
    assert error.value.returned is WRONG[message]
    assert (error.value.batch.prompts, error.value.batch.first, error.value.batch.second) == BATCH


def test_many_wrong_values_and_long_texts_stay_readable() -> None:
    with pytest.raises(JudgeError) as error:
        checked(answers([2.0] * 1000), "mine")(["x" * 5000] * 1000, ["y"] * 1000, ["z"] * 1000)
    assert "and 995 more" in str(error.value) and len(str(error.value)) < 400
    assert error.value.judge == "mine"


def test_what_a_judge_raises_is_told_with_its_name() -> None:
    def remote(prompts, first, second):
        raise TimeoutError("no answer in 30 s")

    with pytest.raises(JudgeError, match="judge remote: raised TimeoutError: no answer in 30 s on 3 pairs") as error:
        checked(remote)(*BATCH)
    assert isinstance(error.value.__cause__, TimeoutError) and error.value.batch.prompts == BATCH[0]

    def impatient(prompts, first, second):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checked(impatient)(*BATCH)


def test_a_wrong_call_is_not_the_judges_fault() -> None:
    with pytest.raises(ValueError, match="as many prompts as first and second responses; got 2 prompts, 1 first, 2"):
        checked(shorter)(["a", "b"], ["c"], ["d", "e"])
    with pytest.raises(TypeError, match="judge: first: expected a list of texts; got one string, 'cd'"):
        checked(shorter)(["a", "b"], "cd", ["e", "f"])
    with pytest.raises(TypeError, match="judge: expected a callable .*; got float"):
        checked(0.5)
    assert checked(shorter)([], [], []).shape == (0,)
    once = checked(shorter)
    assert checked(once) is once and checked(once, "other").name == "other"


def test_a_judge_may_not_change_the_callers_batch() -> None:
    def greedy(prompts, first, second):
        prompts.clear()
        return [0.5] * 3

    mine = [list(column) for column in BATCH]
    checked(greedy)(*mine)
    assert tuple(mine) == BATCH


def test_average_weighs_its_members_and_names_the_one_that_fails() -> None:
    average = AverageJudge([shorter, answers([1.0, 0.0, 0.5])], weights=[3, 1])
    assert checked(average)(*BATCH).tolist() == pytest.approx([0.8125, 0.1875, 0.5])
    assert checked(AverageJudge([shorter, answers([1.0, 0.0, 0.5])]))(*BATCH).tolist() == [0.875, 0.125, 0.5]
    with pytest.raises(JudgeError, match="judge oracle: expected probabilities"):
        checked(AverageJudge([shorter, answers([2.0, 0.0, 0.5])]))(*BATCH)
    assert checked(AverageJudge([answers([1.0, 1.0, 0.0])] * 10, weights=[0.1] * 10))(*BATCH).max() <= 1.0
    for judges, weights, message in (
        ([], None, "at least one judge"),
        ([shorter], [1.0, 2.0], "got 1 judges, 2 weights"),
        ([shorter], [0.0], "expected one above 0"),
        ([shorter, shorter], [1.0, -1.0], "weights: expected a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            AverageJudge(judges, weights)


def test_model_judges_are_the_models() -> None:
    prompts, first, second = (list(column) for column in zip(*shorter_wins(10), strict=True))
    model = comparison_model()
    verdicts = checked(PreferenceModelJudge(model, 4))(prompts, first, second)
    assert torch.equal(verdicts, model.probabilities(prompts, first, second, 4))
    reward = comparison_model(RewardModel)
    torch.testing.assert_close(
        checked(RewardJudge(reward))(prompts, first, second), reward.probabilities(prompts, first, second),
        rtol=0, atol=1e-6,
    )  # fmt: skip
    with pytest.raises(ValueError, match="batch_size: expected an integer"):
        PreferenceModelJudge(model, 0)


def test_reward_judges_of_any_reward() -> None:
    def length(prompts, responses):
        return [len(response) for response in responses]

    logits = torch.tensor([-1.0, 1.0, 0.0], dtype=torch.float64)
    assert torch.equal(checked(RewardJudge(length))(*BATCH), logits.sigmoid())
    assert torch.equal(checked(RewardJudge(length, scale=2.0))(*BATCH), (logits / 2).sigmoid())
    for rewards, message in (
        ([1.0, 2.0], r"expected 3 rewards; got shape \(2,\)"),
        ([1.0, math.nan, 1.0], "expected finite rewards; got nan for number 1, 'bb'"),
        ([1.0, math.inf, 1.0], "expected finite rewards; got inf for number 1, 'bb'"),
    ):
        with pytest.raises(JudgeError, match=f"judge RewardJudge: raised ValueError: {message}"):
            checked(RewardJudge(lambda prompts, responses, rewards=rewards: rewards))(*BATCH)
    with pytest.raises(ValueError, match="scale: expected a finite number"):
        RewardJudge(length, scale=0.0)


def test_antisymmetry_is_checked_on_request() -> None:
    assert check_antisymmetry(shorter, *BATCH) == 0.0
    assert check_antisymmetry(shorter, [], [], []) == 0.0
    with pytest.raises(JudgeError, match=r"judge first_place: .* got 0.500000 \+ 0.700000 for pair 1: prompt 'p1'"):

        def first_place(prompts, first, second):
            return [0.7 if len(one) < len(other) else 0.5 for one, other in zip(first, second, strict=True)]

        check_antisymmetry(first_place, ["p0", "p1"], ["a", "bb"], ["a", "b"])
    with pytest.raises(ValueError, match="tolerance: expected a finite number in"):
        check_antisymmetry(shorter, *BATCH, tolerance=math.inf)
    assert check_antisymmetry(lambda p, f, s: [0.51] * len(p), *BATCH, tolerance=0.1) == pytest.approx(0.02)


@pytest.mark.parametrize("code", [0, 1, "out of quota"])
def test_a_judge_that_calls_exit_ends_nothing(code) -> None:
    """SystemExit, which is not an Exception and could end a run with exit code 0, becomes an error."""

    def leaving(prompts, first, second):
        raise SystemExit(code)

    with pytest.raises(JudgeError, match=rf"judge leaving: raised SystemExit: {code} on 1 pairs"):
        checked(leaving)(["a"], ["b"], ["c"])
