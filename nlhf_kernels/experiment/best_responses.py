"""Exploitability of policies whose answers are texts: the win rate of a best response that is trained against each.

The true exploitability is a maximum over all policies, so a trained response gives a lower bound of it. The bound is
compared with the exact value where answers come from a few candidates (`candidates/`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..evaluation import Sampling, play_tournament, sample_answers
from ..preference import Judge, checked
from .presets import BASELINE
from .runs import configuration, make_trainer
from .supervised import Setting
from .training import AfterStep, save_policy, train_silently
from .workspace import write_json

STARTS = ("reference", "opponent")
RIVALS = 2  # answers of the opponent to every prompt of an update


class OpponentReward:
    """The reward of a best response: the mean probability that an answer is preferred to the opponent's, which are
    sampled anew at every call.

    Args:
        opponent (causal language model): fixed.
        judge (Judge): compares the answers.
        setting (Setting): tokenizer and lengths.
        seed (int): of the opponent's answers.
    """

    def __init__(self, opponent: Any, judge: Judge, setting: Setting, seed: int) -> None:
        self.opponent, self.judge, self.setting = opponent.eval(), checked(judge), setting
        self.seed, self.calls = seed, 0

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
        preset, distinct = self.setting.preset, list(dict.fromkeys(prompts))
        seed = (self.seed + self.calls) % 2**31
        sampling = Sampling(preset.answer_tokens, preset.prompt_tokens, RIVALS, seed=seed, batch=preset.batch)
        answers = sample_answers(self.opponent, None, self.setting.corpus.tokenizer, distinct, sampling)
        self.calls += 1
        rivals = dict(zip(distinct, answers.texts, strict=True))
        values = [
            self.judge(list(prompts), list(responses), [rivals[prompt][number] for prompt in prompts])
            for number in range(RIVALS)
        ]
        return torch.stack(values).mean(0)


def make_best_response(work: Path, opponent: Path, start: str, judge: Judge, setting: Setting) -> None:
    """Train against a fixed policy, with a contestant's budget (RLHF whose reward is `OpponentReward`, at the last of
    the preset's taus), and save the policy.

    Args:
        work (Path): the stage's folder.
        opponent (Path): folder of the fixed policy.
        start (str): of STARTS: the initial weights.
        judge (Judge): compares the answers.
        setting (Setting): shared by all stages.
    """
    preset, device = setting.preset, setting.device
    reward = OpponentReward(setting.load_policy(opponent), judge, setting, seed=1_000_003 * (preset.seed + 1))
    config = configuration(BASELINE, 0, 500 + STARTS.index(start), preset, work / "trainer", device,
                           tau=preset.taus[-1], eval_strategy="no", eval_steps=None)  # fmt: skip
    policy = setting.fresh_policy() if start == "reference" else setting.load_policy(opponent)
    with setting.reporter.bar(f"best response from the {start}", preset.updates) as advance:
        trainer = make_trainer(config, None, reward, setting, [AfterStep(advance)], policy)
        train_silently(trainer)
    save_policy(trainer.model, setting.corpus.tokenizer, work / "policy")


def measure_exploitability(
    work: Path, opponents: dict[str, Path], responses: dict[str, list[Path]], judge: Judge, setting: Setting
) -> None:
    """Measure the best of every policy's responses on the test prompts, its interval widened for the choice.

    Args:
        work (Path): the stage's folder.
        opponents (dict): contestant -> folder of its policy.
        responses (dict): contestant -> folders of its best responses, in the order of STARTS.
        judge (Judge): compares the answers.
        setting (Setting): shared by all stages.
    """
    preset, tokenizer = setting.preset, setting.corpus.tokenizer
    prompts = [row.prompt for row in setting.corpus.test[: preset.test_prompts]]
    sampling = Sampling(preset.answer_tokens, preset.prompt_tokens, preset.answers, seed=preset.seed + 3,
                        batch=preset.batch)  # fmt: skip
    reference = setting.fresh_policy()
    facts: dict[str, Any] = {}
    with setting.reporter.bar("best responses against their opponents", len(opponents)) as advance:
        for count, (name, folder) in enumerate(opponents.items(), start=1):
            players = {"the opponent": folder, **dict(zip(STARTS, responses[name], strict=False))}
            answers = {}
            for player, path in players.items():
                answers[player] = [sample_answers(setting.load_policy(path), reference, tokenizer, prompts, sampling)]
            tournament = play_tournament(judge, prompts, answers)
            starts = [player for player in answers if player != "the opponent"]
            rates = {start: tournament.rate(start, "the opponent", comparisons=len(starts)) for start in starts}
            best = max(starts, key=lambda start: rates[start].mean)
            kl = {player: float(each[0].kl.mean()) for player, each in answers.items() if each[0].kl is not None}
            facts[name] = {"start": best, **rates[best].to_dict(), "kl": kl[best], "opponent_kl": kl["the opponent"]}
            advance(count)
    write_json(work / "exploitability.json", facts)
