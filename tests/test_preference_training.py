"""Training of preference models: a rule, a cycle that no reward fits, batches, seeds, schedules, errors."""

from __future__ import annotations

import math

import pytest
import torch

from nlhf_kernels.data import Pair
from nlhf_kernels.preference import (
    PairwisePreferenceModel,
    PreferenceModelJudge,
    PreferenceTraining,
    RewardModel,
    check_antisymmetry,
    evaluate,
    reliability,
    train_preference_model,
)
from nlhf_kernels.preference.training import _backward, _batches, _slope
from tests.support.preference import comparison_model, rock_paper_scissors, shorter_wins, untrained
from tests.support.tiny_models import one_thread

KINDS = pytest.mark.parametrize("kind", [PairwisePreferenceModel, RewardModel], ids=lambda kind: kind.KIND)
QUICK = PreferenceTraining(steps=100, batch_size=32, learning_rate=3e-3)


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def train(kind, pairs, held_out, settings=QUICK):
    model = untrained(kind)
    return model, train_preference_model(model, pairs, settings, held_out=held_out, progress=False)


@KINDS
def test_both_learn_that_the_shorter_response_wins(kind) -> None:
    model, report = train(kind, shorter_wins(1500), shorter_wins(300, seed=1))
    assert report.losses[0] == pytest.approx(math.log(2)), "a new model knows nothing"
    assert report.evaluation.accuracy > 0.9
    assert report.evaluation.log_loss < 0.4
    assert report.evaluation.calibration_error < 0.2
    prompts, first, second = (list(column) for column in zip(*shorter_wins(40, seed=2), strict=True))
    assert check_antisymmetry(PreferenceModelJudge(model), prompts, first, second, tolerance=0.0) == 0.0


def test_a_preference_model_learns_a_cycle_and_no_reward_model_can() -> None:
    """Rock, paper, scissors. For any rewards the three differences sum to zero, and -log sigmoid is convex: the mean
    loss is at least log 2, and at least one of three comparisons is wrong (two, where rewards are equal, by half)."""
    pairs, held_out = rock_paper_scissors(500), rock_paper_scissors(100, seed=1)
    _, preference = train(PairwisePreferenceModel, pairs, held_out)
    assert preference.evaluation.accuracy > 0.95
    assert preference.evaluation.log_loss < 0.2
    _, reward = train(RewardModel, pairs, held_out)
    assert reward.evaluation.accuracy <= 2 / 3
    assert reward.evaluation.log_loss >= math.log(2) - 1e-6


@KINDS
def test_micro_batches_give_the_gradient_of_the_whole_step(kind) -> None:
    """Micro-batches of any size, also one that does not divide the step, give the gradient of the mean over pairs."""
    gradients, losses = [], []
    for micro in (None, 1, 3, 7):
        model = comparison_model(kind)
        settings = PreferenceTraining(batch_size=7, micro_batch=micro)
        prompts, preferred, rejected = (list(column) for column in zip(*shorter_wins(7), strict=True))
        losses.append(_backward(model, model.encode(prompts, preferred, rejected), settings))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    p = model.probabilities(prompts, preferred, rejected)
    if kind is RewardModel:
        torch.testing.assert_close(losses[0].double(), -p.log().mean(), rtol=1e-5, atol=0)
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        torch.testing.assert_close(loss, losses[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-5 * float(gradients[0].abs().max()))


def test_both_orders_are_seen() -> None:
    """The loss of a pair is the mean of both orders' cross-entropies."""
    model = comparison_model()
    a, b = model(model.encode(["abc"], ["de"], ["f"]))
    expected = -(a.sigmoid().log() + (1 - b.sigmoid()).log()) / 2
    torch.testing.assert_close(model.pair_losses(a, b), expected)


def test_the_seed_decides_all_and_leaves_the_callers_noise_alone() -> None:
    """The seed determines the order of the pairs and dropout; the caller's generator is not advanced."""
    settings = PreferenceTraining(steps=3, batch_size=4, learning_rate=1e-3, seed=5)
    runs = []
    for seed in (5, 5, 6):
        model = comparison_model(architecture="gpt2")
        torch.manual_seed(seed * len(runs))
        before = torch.get_rng_state()
        run_settings = settings if seed == 5 else PreferenceTraining(steps=3, batch_size=4, learning_rate=1e-3, seed=6)
        runs.append(train_preference_model(model, shorter_wins(20), run_settings, progress=False).losses)
        assert torch.equal(torch.get_rng_state(), before)
    assert runs[0] == runs[1] != runs[2]


def test_every_pair_once_an_epoch() -> None:
    batches = _batches(10, PreferenceTraining(batch_size=4, seed=1))
    indices = [index for _ in range(5) for index in next(batches)]
    assert sorted(indices[:10]) == sorted(indices[10:]) == list(range(10)) and indices[:10] != indices[10:]


def test_the_learning_rate_rises_and_falls() -> None:
    slope = [_slope(step, PreferenceTraining(steps=20, warmup=0.2)) for step in range(20)]
    assert slope[4] == 1.0 and slope[-1] == pytest.approx(1 / 16)
    assert slope[:5] == sorted(slope[:5]) and slope[4:] == sorted(slope[4:], reverse=True) and min(slope) > 0
    assert [_slope(step, PreferenceTraining(steps=2, warmup=1.0)) for step in range(2)] == pytest.approx([1 / 3, 2 / 3])


def test_modes_and_the_bar(capfd) -> None:
    model = comparison_model(architecture="gpt2")
    assert not model.body.training
    settings = PreferenceTraining(steps=2, batch_size=2, bfloat16=True)
    report = train_preference_model(model, shorter_wins(4), settings)
    assert not model.body.training and len(report.losses) == 2 and report.evaluation is None
    assert model.body.wte.weight.dtype == torch.float32, "autocast leaves the weights as they are"
    assert capfd.readouterr().out == "", "the bar is on stderr"


def test_bfloat16_computes_in_bfloat16() -> None:
    dtypes = []
    model = comparison_model()
    model.body.layers[0].mlp.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    for low in (False, True):
        settings = PreferenceTraining(steps=1, batch_size=2, bfloat16=low)
        train_preference_model(model, shorter_wins(4), settings, progress=False)
    assert dtypes == [torch.float32, torch.bfloat16]


def test_what_is_not_finite_stops_before_the_weights_take_it_in() -> None:
    model = comparison_model()
    model.body.norm.weight.data[0] = torch.nan
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match="step 0: expected a finite loss and gradient; got nan"):
        train_preference_model(model, shorter_wins(4), PreferenceTraining(steps=2), progress=False)
    assert all(
        torch.equal(old, new.nan_to_num(0.0))
        for old, new in zip(map(torch.nan_to_num, before), model.parameters(), strict=True)
    )


def test_bad_settings_and_data_are_refused_before_any_step() -> None:
    model = comparison_model(max_length=20)
    with pytest.raises(ValueError, match="pairs: expected at least one"):
        train_preference_model(model, [])
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    for given, argument in (({"pairs": rows}, "pairs"), ({"pairs": shorter_wins(4), "held_out": rows}, "held_out")):
        with pytest.raises(TypeError, match=rf"train_preference_model: {argument}\[0\]: expected a Pair .*; got dict"):
            train_preference_model(model, **given, progress=False)
    low = comparison_model()
    low.body.to(torch.bfloat16)
    with pytest.raises(ValueError, match="model: expected float32 weights, .*; body.embed_tokens.weight is not"):
        train_preference_model(low, shorter_wins(4), progress=False)
    with pytest.raises(ValueError, match="too long"):
        train_preference_model(model, shorter_wins(4), held_out=[Pair("a" * 30, "b", "c")])
    for name, value in (("steps", 0), ("batch_size", 0), ("micro_batch", 17), ("learning_rate", 0.0), ("warmup", 2.0),
                        ("weight_decay", -1.0), ("clip", 0.0), ("seed", -1)):  # fmt: skip
        with pytest.raises(ValueError, match=f"PreferenceTraining: {name}: expected"):
            PreferenceTraining(**{name: value})


def test_reliability_by_hand() -> None:
    """Confidences .6, .6, .9, .5; right, wrong, right, tie. Two bins: [.5, .75) and [.75, 1]."""
    measures = reliability(torch.tensor([0.6, 0.4, 0.9, 0.5], dtype=torch.float64), bins=2)
    assert measures.count == 4 and measures.accuracy == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert measures.log_loss == pytest.approx(-sum(map(math.log, (0.6, 0.4, 0.9, 0.5))) / 4)
    low, high = measures.bins
    assert (low.low, low.high, low.count, high.low, high.high, high.count) == (0.5, 0.75, 3, 0.75, 1.0, 1)
    assert low.confidence == pytest.approx(1.7 / 3) and low.accuracy == pytest.approx(0.5)
    assert measures.calibration_error == pytest.approx((3 * abs(0.5 - 1.7 / 3) + 0.1) / 4)
    sure = reliability(torch.tensor([1.0, 0.0]))
    assert sure.bins[-1].high == 1.0 and sure.bins[-1].count == 2 and math.isfinite(sure.log_loss)


def test_a_liking_for_the_first_place_is_not_skill() -> None:
    pairs = shorter_wins(40)
    answer = torch.full((40,), 0.9, dtype=torch.float64)
    measures = evaluate(lambda prompts, first, second: answer, pairs)
    assert measures.accuracy == 0.5 and measures.calibration_error == pytest.approx(0.4)
    assert answer.tolist() == [0.9] * 40, "a judge's own tensor is left alone"
    right = evaluate(lambda prompts, first, second: [float(len(a) < len(b)) for a, b in zip(first, second)], pairs)  # noqa: B905
    assert right.accuracy == 1.0 and right.calibration_error == 0.0
    for wrong in (torch.tensor([0.5, math.nan]), torch.tensor([1.5]), torch.tensor([]), torch.tensor(0.5)):
        with pytest.raises(ValueError, match="reliability: probabilities: expected some in"):
            reliability(wrong)


def test_calibration_tells_the_honest_from_the_sure() -> None:
    """Outcomes drawn with the predicted probability give an error of a few thousandths; overconfidence, its excess."""
    truth = torch.rand(40_000, dtype=torch.float64)
    won = torch.rand(40_000, dtype=torch.float64) < truth
    honest = reliability(torch.where(won, truth, 1 - truth))
    assert honest.calibration_error < 0.02
    surer = (4 * truth.logit()).sigmoid()
    assert reliability(torch.where(won, surer, 1 - surer)).calibration_error > 0.1
    with pytest.raises(ValueError, match="pairs: expected at least one"):
        evaluate(lambda *columns: [], [])
    with pytest.raises(TypeError, match=r"evaluate: pairs\[0\]: expected a Pair .*; got dict"):
        evaluate(lambda *columns: [0.9], [{"prompt": "a", "chosen": "b", "rejected": "c"}])
