"""Preference models on a GPU: agreement with the CPU, consistency of both orders to the bit, resumed training."""

from __future__ import annotations

import pytest
import torch

from nlhf_kernels.preference import (
    PairwisePreferenceModel,
    PreferenceTraining,
    RewardModel,
    load_preference_model,
    save_preference_model,
    train_preference_model,
)
from tests.support.preference import comparison_model, shorter_wins

pytestmark = pytest.mark.gpu
KINDS = pytest.mark.parametrize("kind", [PairwisePreferenceModel, RewardModel], ids=lambda kind: kind.KIND)
COLUMNS = tuple(list(column) for column in zip(*shorter_wins(30), strict=True))


@KINDS
def test_the_gpu_says_what_the_cpu_says_and_both_orders_agree(kind) -> None:
    prompts, first, second = COLUMNS
    expected = comparison_model(kind).probabilities(*COLUMNS)
    model = comparison_model(kind).cuda()
    straight = model.probabilities(prompts, first, second, 8)
    torch.testing.assert_close(straight, expected, rtol=0, atol=2e-3)  # TF32 may be on
    back = model.probabilities(prompts, second, first, 8)
    assert all(p + q == 1.0 for p, q in zip(straight.tolist(), back.tolist(), strict=True))


@KINDS
@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_training_learns_goes_on_and_is_saved(kind, low, tmp_path) -> None:
    settings = PreferenceTraining(steps=60, batch_size=32, learning_rate=3e-3, bfloat16=low)
    pairs, held_out = shorter_wins(600), shorter_wins(200, seed=1)
    model = comparison_model(kind, "gpt2").cuda()  # has dropout
    options = {"held_out": held_out, "progress": False, "checkpoint": tmp_path / "run", "checkpoint_every": 40}
    report = train_preference_model(model, pairs, settings, **options)
    assert sum(report.losses[-10:]) < 0.9 * sum(report.losses[:10]) and report.evaluation.accuracy > 0.5
    again = train_preference_model(comparison_model(kind, "gpt2").cuda(), pairs, settings, **options)
    assert again.losses == report.losses and again.evaluation.accuracy == report.evaluation.accuracy
    save_preference_model(model, tmp_path / "model")
    loaded_model = load_preference_model(tmp_path / "model", device="cuda")
    assert torch.equal(loaded_model.probabilities(*COLUMNS), model.probabilities(*COLUMNS))


def test_dropouts_noise_goes_on_too(tmp_path, monkeypatch) -> None:
    from nlhf_kernels.preference import training

    settings = PreferenceTraining(steps=6, batch_size=4, learning_rate=1e-3)
    options = {"progress": False, "checkpoint": tmp_path / "run", "checkpoint_every": 3}
    straight = train_preference_model(comparison_model(architecture="gpt2").cuda(), shorter_wins(20), settings,
                                      progress=False).losses  # fmt: skip
    calls, step = [], training._backward

    def stop(*arguments):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(*arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(training, "_backward", stop)
        train_preference_model(comparison_model(architecture="gpt2").cuda(), shorter_wins(20), settings, **options)
    resumed = train_preference_model(
        comparison_model(architecture="gpt2").cuda(), shorter_wins(20), settings, **options
    )
    assert resumed.losses == pytest.approx(straight, rel=1e-4)
