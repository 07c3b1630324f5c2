"""Experience of an update: sampled answers to its prompts, and their advantages.

Experiences are made for all micro-batches of an update at once, so that a baseline over the batch covers the whole
batch, and the judge is called once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import pad

from ..engine import Finish, Responses, RolloutResult, RolloutSettings
from ..evaluation import response_kl, response_texts
from ..ops.logprobs.layout import IGNORED
from ..preference import checked
from .config import NashConfig
from .meters import Meters, PhaseTimer
from .rewards import rewards


@dataclass(frozen=True)
class Experience:
    """One micro-batch: B pairs of answers (y, y'), R rows to train on: y, and for IPO y' after them."""

    input_ids: torch.Tensor  # (R, S + T): prompt, padded on the left, and answer, padded on the right
    attention_mask: torch.Tensor  # (R, S + T)
    targets: torch.Tensor  # (R, T): the answer, IGNORED after its end
    reference_logprobs: torch.Tensor  # (R, T)
    unended: torch.Tensor  # (B, 1 or 2) bool: y and y' without an end token
    prompts: list[str]  # B
    answers: tuple[list[str], ...]  # y and, where there is one, y'; B texts each
    value: torch.Tensor  # (B,) float64: P(y > y') or the reward of y
    advantage: torch.Tensor  # (B,) float64: value, less penalties and the baseline

    @property
    def pairs(self) -> int:
        return len(self.prompts)


def rollout_seed(seed: int, step: int) -> int:
    """Return a key that differs for every update of every run."""
    return seed << 32 | step


def teacher_forced(
    batch: dict[str, Any], answers: Sequence[Responses]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, mask, targets and reference log-probabilities of prompts with their answers, player after player."""
    width = max(answer.tokens.shape[1] for answer in answers)
    tokens, mask, reference = (
        torch.cat([pad(part, (0, width - part.shape[1])) for part in parts])
        for parts in zip(*((answer.tokens, answer.mask, answer.reference_logprobs) for answer in answers), strict=True)
    )
    prompts = [
        batch[name].repeat_interleave(len(answers[0].tokens) // len(batch["index"]), 0).repeat(len(answers), 1)
        for name in ("input_ids", "attention_mask")
    ]
    return (
        torch.cat([prompts[0], tokens], 1),
        torch.cat([prompts[1], mask.long()], 1),
        tokens.masked_fill(~mask, IGNORED),
        reference,
    )


class ExperienceCollector:
    """Sample answers to prompts, judge them and compute advantages. A subclass may override `judge_answers`.

    Args:
        config: the run's configuration.
        rollout: the engine's rollout with the current weights.
        tokenizer: decodes answers.
        settings: of sampling; the seed is replaced for every update.
        judge: a Judge, or a Reward where the algorithm is judged by one.
        total: returns the sum of a tensor over all processes.
        meters: record the measures of answers and judgements.
        timer: times the phases "rollout" and "judge" and counts tokens.
    """

    def __init__(
        self,
        config: NashConfig,
        rollout: Callable[..., RolloutResult],
        tokenizer: Any,
        settings: RolloutSettings,
        judge: Any,
        total: Callable[[torch.Tensor], torch.Tensor],
        meters: Meters,
        timer: PhaseTimer,
    ) -> None:
        self.config, self.rollout, self.tokenizer, self.settings = config, rollout, tokenizer, settings
        self.judge, self.total, self.meters, self.timer = judge, total, meters, timer

    def __call__(self, batches: Sequence[dict[str, Any]], step: int, beta: float) -> list[Experience]:
        """Return the experiences of an update.

        Args:
            batches: prompts of each micro-batch.
            step: number of the update.
            beta: the reference's weight in the opponent's mixture.
        """
        with self.timer.phase("rollout"):
            settings = replace(self.settings, seed=rollout_seed(self.config.seed, step))
            experiences = [self._answer(batch, settings, beta) for batch in batches]
        with self.timer.phase("judge"):
            return self._with_advantages(self.judge_answers(experiences))

    def _answer(self, batch: dict[str, Any], settings: RolloutSettings, beta: float) -> Experience:
        algorithm, count = self.config.algorithm_spec, self.config.samples_per_prompt
        players = algorithm.players(beta, count, batch["index"])
        answers = list(self.rollout(batch["input_ids"], batch["attention_mask"], players, settings))
        self._measure(answers, beta)
        unknown = torch.empty(0, dtype=torch.float64, device="cpu")
        return Experience(
            *teacher_forced(batch, answers if algorithm.trains_pairs else answers[:1]),
            unended=torch.stack([answer.finish != Finish.END for answer in answers], 1).cpu(),
            prompts=[text for text in batch["texts"] for _ in range(count)],
            answers=tuple(response_texts(self.tokenizer, answer) for answer in answers),
            value=unknown,
            advantage=unknown,
        )

    def _measure(self, answers: Sequence[Responses], beta: float) -> None:
        first = answers[0]
        self.timer.tokens += sum(int(answer.lengths.sum()) for answer in answers)
        self.meters.add("length", first.lengths.float())
        self.meters.add("end_rate", (first.finish == Finish.END).float())
        if not self.config.algorithm_spec.trains_pairs or beta == 0:  # else y is the mixture's, not the policy's
            assert first.policy_logprobs is not None
            self.meters.add("kl", response_kl(first))
            self.meters.add("entropy", -first.policy_logprobs[first.mask])

    def judge_answers(self, experiences: Sequence[Experience]) -> list[Experience]:
        """Return the experiences with their values, from one call of the judge or reward.

        Args:
            experiences: all micro-batches of an update, not judged yet.
        """
        prompts = [text for part in experiences for text in part.prompts]
        sides = range(len(experiences[0].answers))
        answers = [[text for part in experiences for text in part.answers[side]] for side in sides]
        if self.config.algorithm_spec.judged_by == "reward":
            name, values = "reward", rewards(self.judge, prompts, *answers)
        else:
            name, values = "preference", checked(self.judge)(prompts, *answers)
        self.meters.add(name, values.to(experiences[0].input_ids.device))
        parts = values.split([part.pairs for part in experiences])
        return [replace(part, value=value) for part, value in zip(experiences, parts, strict=True)]

    def _with_advantages(self, experiences: Sequence[Experience]) -> list[Experience]:
        penalty, baseline = self.config.missing_eos_penalty, self.config.baseline
        if baseline is None:
            baseline = "batch" if self.config.algorithm_spec.judged_by == "reward" else 0.5
        values = [part.value - penalty * part.unended[:, 0] for part in experiences]
        if self.config.algorithm_spec.trains_pairs:  # y' is trained on too: its missing end counts in favour of y
            values = [value + penalty * part.unended[:, 1] for part, value in zip(experiences, values, strict=True)]
            baseline = 0.5
        if isinstance(baseline, str):  # the mean of all other pairs
            every = torch.cat(values)
            sums = torch.tensor([float(every.sum()), len(every)], dtype=torch.float64, device="cpu")
            total, count = self.total(sums.to(experiences[0].input_ids.device)).tolist()
            baselines = [(total - value) / max(count - 1, 1) for value in values]
        else:
            baselines = [torch.full_like(value, baseline) for value in values]
        triples = zip(experiences, values, baselines, strict=True)
        return [replace(part, advantage=value - base) for part, value, base in triples]
