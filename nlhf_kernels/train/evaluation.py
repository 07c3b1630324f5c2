"""Evaluation during training: win rates of the policy's answers under the judge, and its KL from the reference.

Every evaluation samples with the same noise, so that two evaluations differ by the policy alone. The answers of models
that do not change (the reference, `eval_opponent`) are sampled once and cached.
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
from .processes import DataParallel
from .prompts import PromptCollator, PromptDataset
from .rewards import Reward, rewards

_STEP = 2**32 - 1  # a step that no update has
Rollout = Callable[..., RolloutResult]


class Evaluator:
    """Measure the policy on prompts, against the reference, the opponent and `eval_opponent`.

    Args:
        config: the run's configuration.
        rollout: rollout of the training engine with the current weights.
        eval_opponent_rollout: likewise of `eval_opponent`; None where there is none.
        tokenizer: decodes answers.
        settings: of sampling in training; temperature and seed are replaced.
        collator: makes batches of prompts.
        judge: compares answers; None: no win rates.
        reward: measures answers; None: no rewards.
        processes: of the trainer: device, groups, sums over groups.
    """

    def __init__(
        self,
        config: NashConfig,
        rollout: Rollout,
        eval_opponent_rollout: Rollout | None,
        tokenizer: Any,
        settings: RolloutSettings,
        collator: PromptCollator,
        judge: Judge | None,
        reward: Reward | None,
        processes: DataParallel,
    ) -> None:
        self.config, self.rollout, self.eval_opponent_rollout = config, rollout, eval_opponent_rollout
        seed = rollout_seed(config.seed, _STEP)
        self.settings = replace(settings, temperature=config.eval_temperature, seed=seed)
        self.tokenizer, self.collator, self.processes = tokenizer, collator, processes
        self.judge, self.reward = judge, reward
        self.rivals: tuple[str, ...] = (
            "reference",
            *(["eval_opponent"] if eval_opponent_rollout is not None else []),
            *(["opponent"] if config.algorithm_spec.own_parameters else []),
        )
        self._cache: dict[tuple[str, str, int], list[str]] = {}  # (opponent, prompts, batch) -> answers

    def __call__(self, prompts: PromptDataset, prefix: str) -> dict[str, float]:
        """Return the metrics over all prompts; every group of processes takes its share of them.

        Args:
            prompts: the prompts.
            prefix: of the metrics' names.
        """
        meters, digest = Meters(), prompts.digest()
        indices = range(self.processes.group, len(prompts), self.processes.groups)
        size = self.config.per_device_eval_batch_size
        for start in range(0, len(indices), size):
            batch = self.collator([prompts[index] for index in indices[start : start + size]])
            for name, value in batch.items():
                batch[name] = value.to(self.processes.device) if isinstance(value, torch.Tensor) else value
            self._measure(meters, batch, (digest, start))
        return {f"{prefix}_{name}": value for name, value in meters.means(self.processes).items()}

    def metric_names(self) -> list[str]:
        """Return the names of the metrics, without a prefix."""
        names = ["kl", "entropy", "length", "end_rate"]
        if self.judge is not None:
            names += [f"win_rate_{rival}" for rival in self.rivals]
        return names if self.reward is None else [*names, "reward", *(f"reward_{rival}" for rival in self.rivals)]

    def _measure(self, meters: Meters, batch: dict[str, Any], key: tuple[str, int]) -> None:
        players = [self._player(0, batch)]
        if self.config.algorithm_spec.own_parameters:
            players.append(replace(self._player(2, batch), parameters="opponent"))
        policy, *opponent = self._sample(self.rollout, batch, players)
        assert policy.policy_logprobs is not None
        meters.add("kl", response_kl(policy))
        meters.add("entropy", -policy.policy_logprobs[policy.mask])
        meters.add("length", policy.lengths.float())
        meters.add("end_rate", (policy.finish == Finish.END).float())
        answers = response_texts(self.tokenizer, policy)
        rivals = {"reference": self._cached("reference", key, self.rollout, batch, self._player(1, batch, beta=1.0))}
        if self.eval_opponent_rollout is not None:
            rivals["eval_opponent"] = self._cached(
                "eval_opponent", key, self.eval_opponent_rollout, batch, self._player(3, batch)
            )
        for responses in opponent:
            rivals["opponent"] = response_texts(self.tokenizer, responses)
        prompts = [text for text in batch["texts"] for _ in range(self.config.eval_samples_per_prompt)]
        for name, rival_answers in rivals.items():
            if self.judge is not None:
                wins = checked(self.judge)(prompts, answers, rival_answers)
                meters.add(f"win_rate_{name}", wins.to(self.processes.device))
            if self.reward is not None:
                values = rewards(self.reward, prompts, rival_answers)
                meters.add(f"reward_{name}", values.to(self.processes.device))
        if self.reward is not None:
            meters.add("reward", rewards(self.reward, prompts, answers).to(self.processes.device))

    def _player(self, stream: int, batch: dict[str, Any], beta: float = 0.0) -> Player:
        return Player(beta, Stream.USER + stream, self.config.eval_samples_per_prompt, batch["index"])

    def _sample(self, rollout: Rollout, batch: dict[str, Any], players: list[Player]) -> list[Responses]:
        result = list(rollout(batch["input_ids"], batch["attention_mask"], players, self.settings))
        for responses in result:
            responses.check_finite("NashTrainer: evaluate")
        return result

    def _cached(
        self, rival: str, key: tuple[str, int], rollout: Rollout, batch: dict[str, Any], player: Player
    ) -> list[str]:
        """Return the answers of a model that does not change, sampled at the first evaluation."""
        entry = (rival, *key)
        if entry not in self._cache:
            (responses,) = self._sample(rollout, batch, [player])
            self._cache[entry] = response_texts(self.tokenizer, responses)
        return self._cache[entry]
