"""Learning by the real training loop, on a game of one-token answers: each algorithm reaches its theoretical limit."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("accelerate", reason="training needs accelerate")

from nlhf_kernels.tabular import PreferenceGame, best_response, equilibrium
from tests.support.training import LetterGame, history, make_trainer, single_thread  # noqa: F401

TAU, BETA = 0.4, 0.3
TOLERANCE = 0.02  # total variation; 512 answers an update leave up to 0.01
RUN = {
    "train_dataset": [{"prompt": "a"}] * 16, "per_device_train_batch_size": 16, "samples_per_prompt": 32,
    "max_new_tokens": 1, "tau": TAU, "max_steps": 150, "learning_rate": 0.04, "lr_scheduler_type": "cosine",
    "max_grad_norm": 0.0, "logging_steps": 50, "max_prompt_length": 4, "adam_beta2": 0.99,
}  # fmt: skip


def final(algorithm: str, tmp_path, **options) -> tuple[LetterGame, torch.Tensor, torch.Tensor]:
    """Train; return the game, and the log-probabilities of reference and trained policy."""
    game = LetterGame()
    model = game.model()
    reference = game.log_probabilities(model)
    judge = {"judge": None if algorithm == "rlhf" else game.judge}
    trainer = make_trainer(
        tmp_path, model=model, tokenizer=game.tokenizer(), algorithm=algorithm, **{**judge, **RUN, **options}
    )
    trainer.train()
    return game, reference, game.log_probabilities(trainer.model)


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return 0.5 * float((first.exp() - second.exp()).abs().sum())


def expected(game: LetterGame, reference: torch.Tensor, tau: float) -> torch.Tensor:
    return equilibrium(PreferenceGame(game.preference, reference.exp(), tau))


@pytest.mark.parametrize("algorithm", ["nash-md", "ipo-md"])
def test_the_mixture_reaches_the_equilibrium_of_the_larger_tau(algorithm, tmp_path) -> None:
    """At a fixed point log pi = log mu + P(. > mix) / tau, so the mixture is the equilibrium at tau / (1 - beta)."""
    game, reference, policy = final(algorithm, tmp_path, beta=BETA)
    mixture = ((1 - BETA) * policy + BETA * reference).log_softmax(-1)
    goal = expected(game, reference, TAU / (1 - BETA))
    assert distance(mixture, goal) < TOLERANCE
    assert distance(mixture, expected(game, reference, TAU)) > TOLERANCE, "not of tau itself"
    assert distance(policy, goal) > TOLERANCE, "nor is it the policy"
    assert distance(reference, goal) > 3 * TOLERANCE, "else there was nothing to learn"


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("self-play", {}),
        ("self-play", {"kl": "exact", "baseline": "batch"}),
        ("online-ipo", {}),
        ("nash-ema", {"ema_decay": 0.8}),
        ("nash-mp", {"refresh_steps": 10, "anchor_weight": 0.05}),
    ],
)
def test_against_its_own_kind_the_policy_reaches_the_equilibrium(algorithm, options, tmp_path) -> None:
    game, reference, policy = final(algorithm, tmp_path, **options)
    goal = expected(game, reference, TAU)
    assert distance(policy, goal) < TOLERANCE
    assert distance(reference, goal) > 3 * TOLERANCE, "else there was nothing to learn"


def test_online_dpo_reaches_the_reward_that_explains_the_preferences(tmp_path) -> None:
    game = LetterGame()

    def judge(prompts, first, second) -> torch.Tensor:
        return (game.reward(prompts, first) - game.reward(prompts, second)).sigmoid()

    _, reference, policy = final("online-dpo", tmp_path, judge=judge)
    goal = (reference + game.rewards / TAU).log_softmax(-1)
    preference = (game.rewards[:, None] - game.rewards).sigmoid()
    assert distance(policy, goal) < TOLERANCE
    assert distance(equilibrium(PreferenceGame(preference, reference.exp(), TAU)), goal) > 3 * TOLERANCE, "not IPO's"


def test_best_response_answers_the_reference_and_rlhf_the_reward(tmp_path) -> None:
    game, reference, policy = final("best-response", tmp_path / "response")
    goal = best_response(reference, PreferenceGame(game.preference, reference.exp(), TAU))
    assert distance(policy, goal) < TOLERANCE
    assert distance(expected(game, reference, TAU), goal) > TOLERANCE, "another point than the equilibrium"
    game, reference, policy = final("rlhf", tmp_path / "reward", reward=LetterGame().reward)
    assert distance(policy, (reference + game.rewards / TAU).log_softmax(-1)) < TOLERANCE


def test_fused_and_reference_kernels_learn_the_same(tmp_path) -> None:
    curves = []
    for backend in ("torch", None):
        torch.manual_seed(0)
        trainer = make_trainer(
            tmp_path / str(backend), backend=backend, max_steps=8, learning_rate=1e-3, tau=0.1,
            adam_epsilon=1e-3,  # else Adam amplifies gradients that are only rounding
        )  # fmt: skip
        trainer.train()
        curves.append(torch.tensor(history(trainer, "loss", "grad_norm", "kl", "preference")))
    assert torch.allclose(curves[0], curves[1], rtol=1e-3, atol=1e-5)
    assert curves[0][0, 1] > 0 and not torch.equal(curves[0][0], curves[0][-1])
