"""What an update learns from: answers to its prompts, and what they were worth. Made for all micro-batches at once, so
that a baseline over the batch sees the whole batch, and the judge is asked once."""

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
from .meters import Clock, Meters
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
    """A key of its own for every update of every run."""
    return seed << 32 | step


def teacher_forced(
    batch: dict[str, Any], answers: Sequence[Responses]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Answers behind their prompts, one player's rows after the other's: ids, mask, targets, reference log-probs."""
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


class Collector:
    """Prompts -> answers -> judgements -> advantages."""

    def __init__(
        self,
        config: NashConfig,
        rollout: Callable[..., RolloutResult],  # the engine's
        tokenizer: Any,
        settings: RolloutSettings,  # of sampling; the seed is set for every update
        judge: Any,  # a Judge, or a Reward where the algorithm is judged by one
        total: Callable[[torch.Tensor], torch.Tensor],  # a sum over all processes
        meters: Meters,
        clock: Clock,
    ) -> None:
        self.config, self.rollout, self.tokenizer, self.settings = config, rollout, tokenizer, settings
        self.judge, self.total, self.meters, self.clock = judge, total, meters, clock

    def __call__(self, batches: Sequence[dict[str, Any]], step: int, beta: float) -> list[Experience]:
        with self.clock.phase("rollout"):
            settings = replace(self.settings, seed=rollout_seed(self.config.seed, step))
            made = [self._answer(batch, settings, beta) for batch in batches]
        with self.clock.phase("judge"):
            return self._with_advantages(self._judged(made))

    def _answer(self, batch: dict[str, Any], settings: RolloutSettings, beta: float) -> Experience:
        plan, samples = self.config.plan, self.config.samples_per_prompt
        players = plan.players(beta, samples, batch["index"])
        answers = list(self.rollout(batch["input_ids"], batch["attention_mask"], players, settings))
        self._measure(answers, beta)
        nothing = torch.empty(0, dtype=torch.float64, device="cpu")
        return Experience(
            *teacher_forced(batch, answers if plan.loss == "ipo" else answers[:1]),
            unended=torch.stack([answer.finish != Finish.END for answer in answers], 1).cpu(),
            prompts=[text for text in batch["texts"] for _ in range(samples)],
            answers=tuple(response_texts(self.tokenizer, answer) for answer in answers),
            value=nothing,
            advantage=nothing,
        )

    def _measure(self, answers: Sequence[Responses], beta: float) -> None:
        first = answers[0]
        self.clock.tokens += sum(int(answer.lengths.sum()) for answer in answers)
        self.meters.add("length", first.lengths.float())
        self.meters.add("end_rate", (first.finish == Finish.END).float())
        if self.config.plan.loss != "ipo" or beta == 0:  # else y is not the policy's, and tells nothing of these
            assert first.policy_logprobs is not None
            self.meters.add("kl", response_kl(first))
            self.meters.add("entropy", -first.policy_logprobs[first.mask])

    def _judged(self, made: Sequence[Experience]) -> list[Experience]:
        prompts = [text for each in made for text in each.prompts]
        answers = [[text for each in made for text in each.answers[side]] for side in range(len(made[0].answers))]
        if self.config.plan.judged_by == "reward":
            values = rewards(self.judge, prompts, *answers)
        else:
            values = checked(self.judge)(prompts, *answers)
        self.meters.add(
            "reward" if self.config.plan.judged_by == "reward" else "preference",
            values.to(made[0].input_ids.device),
        )
        parts = values.split([each.pairs for each in made])
        return [replace(each, value=value) for each, value in zip(made, parts, strict=True)]

    def _with_advantages(self, made: Sequence[Experience]) -> list[Experience]:
        penalty = self.config.missing_eos_penalty
        baseline = self.config.baseline
        if baseline is None:
            baseline = "batch" if self.config.plan.judged_by == "reward" else 0.5
        worth = [each.value - penalty * each.unended[:, 0] for each in made]
        if self.config.plan.loss == "ipo":  # the other answer is trained on too: its missing end counts for this one
            worth = [value + penalty * each.unended[:, 1] for each, value in zip(made, worth, strict=True)]
            baseline = 0.5
        if isinstance(baseline, str):  # the mean of all others
            every = torch.cat(worth)
            facts = torch.tensor([float(every.sum()), len(every)], dtype=torch.float64, device="cpu")
            total, count = self.total(facts.to(made[0].input_ids.device)).tolist()
            less = [(total - value) / max(count - 1, 1) for value in worth]
        else:
            less = [torch.full_like(value, baseline) for value in worth]
        return [replace(each, advantage=value - base) for each, value, base in zip(made, worth, less, strict=True)]
