"""Evaluation during training: does the judge prefer the policy's answers, and how far has the policy gone for it?

Every evaluation draws with the same noise, so two of them differ by what the policy has learned. Rivals that do not
change (the reference, a saved opponent) answer once; their answers are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..core.rng import Stream
from ..engine import Finish, Player, Responses, RolloutResult, RolloutSettings
from ..evaluation import response_kl, response_texts
from ..preference import Judge, checked
from .config import NashConfig
from .experience import rollout_seed
from .meters import Meters
from .prompts import Collator, PromptDataset
from .rewards import Reward, rewards

_STEP = 2**32 - 1  # of no update
Rollout = Callable[..., RolloutResult]


class Evaluator:
    def __init__(
        self,
        config: NashConfig,
        rollout: Rollout,  # of the training's engine
        saved: Rollout | None,  # of the saved opponent's
        tokenizer: Any,
        settings: RolloutSettings,
        collator: Collator,
        judge: Judge | None,
        reward: Reward | None,
        accelerator: Any,
    ) -> None:
        self.config, self.rollout, self.saved, self.tokenizer = config, rollout, saved, tokenizer
        seed = rollout_seed(config.seed, _STEP)
        self.settings = replace(settings, temperature=config.eval_temperature, seed=seed)
        self.collator, self.judge, self.reward, self.accelerator = collator, judge, reward, accelerator
        self._kept: dict[tuple[str, str, int], list[str]] = {}  # (rival, prompts, batch) -> answers

    def __call__(self, prompts: PromptDataset, prefix: str) -> dict[str, float]:
        """Every process takes its share of the prompts; the means are over all."""
        meters, digest = Meters(), prompts.digest()
        mine = range(self.accelerator.process_index, len(prompts), self.accelerator.num_processes)
        size = self.config.per_device_eval_batch_size
        for start in range(0, len(mine), size):
            batch = self.collator([prompts[index] for index in mine[start : start + size]])
            batch = {name: self._place(value) for name, value in batch.items()}
            self._measure(meters, batch, (digest, start))
        return {f"{prefix}_{name}": value for name, value in meters.means(self.accelerator).items()}

    def _place(self, value: Any) -> Any:
        return value.to(self.accelerator.device) if isinstance(value, torch.Tensor) else value

    def _measure(self, meters: Meters, batch: dict[str, Any], key: tuple[str, int]) -> None:
        players = [self._player(0, batch)]
        if self.config.plan.own_parameters:
            players.append(replace(self._player(2, batch), parameters="opponent"))
        policy, *opponent = self._answer(self.rollout, batch, players)
        assert policy.policy_logprobs is not None
        meters.add("kl", response_kl(policy))
        meters.add("entropy", -policy.policy_logprobs[policy.mask])
        meters.add("length", policy.lengths.float())
        meters.add("end_rate", (policy.finish == Finish.END).float())
        answers, rivals = response_texts(self.tokenizer, policy), {"reference": self._reference(batch, key)}
        if self.saved is not None:
            rivals["saved_opponent"] = self._saved(batch, key)
        for responses in opponent:
            rivals["opponent"] = response_texts(self.tokenizer, responses)
        prompts = [text for text in batch["texts"] for _ in range(self.config.eval_samples_per_prompt)]
        for name, theirs in rivals.items():
            if self.judge is not None:
                wins = checked(self.judge)(prompts, answers, theirs)
                meters.add(f"win_rate_{name}", wins.to(self.accelerator.device))
            if self.reward is not None:
                meters.add(f"reward_{name}", rewards(self.reward, prompts, theirs).to(self.accelerator.device))
        if self.reward is not None:
            meters.add("reward", rewards(self.reward, prompts, answers).to(self.accelerator.device))

    def _player(self, stream: int, batch: dict[str, Any], beta: float = 0.0) -> Player:
        return Player(beta, Stream.USER + stream, self.config.eval_samples_per_prompt, batch["index"])

    def _answer(self, rollout: Rollout, batch: dict[str, Any], players: list[Player]) -> list[Responses]:
        found = list(rollout(batch["input_ids"], batch["attention_mask"], players, self.settings))
        for responses in found:
            responses.check_finite("NashTrainer: evaluate")
        return found

    def _reference(self, batch: dict[str, Any], key: tuple[str, int]) -> list[str]:
        return self._keep("reference", key, self.rollout, batch, self._player(1, batch, beta=1.0))

    def _saved(self, batch: dict[str, Any], key: tuple[str, int]) -> list[str]:
        assert self.saved is not None
        return self._keep("saved_opponent", key, self.saved, batch, self._player(3, batch))

    def _keep(
        self, rival: str, key: tuple[str, int], rollout: Rollout, batch: dict[str, Any], player: Player
    ) -> list[str]:
        place = (rival, *key)
        if place not in self._kept:
            self._kept[place] = response_texts(self.tokenizer, self._answer(rollout, batch, [player])[0])
        return self._kept[place]
