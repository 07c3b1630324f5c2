"""One training run: a contestant, a tau, a seed, the budget that is the same for all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..preference import Judge, RewardModel
from ..train import NashConfig, NashTrainer
from ..train.rewards import Reward
from .presets import CONTESTANTS, Preset, label, policy_name
from .supervised import Setting
from .training import AfterStep, save_policy, silent_options, train_silently
from .workspace import RUNS, write_json

LOGGED = (
    *("step", "loss", "grad_norm", "preference", "reward", "kl", "entropy", "length", "end_rate"),
    "tokens_per_second",
)


def stage_name(contestant: str, index: int, seed: int) -> str:
    return f"{RUNS}/{policy_name(contestant, index)}-seed{seed}"


def configuration(
    contestant: str, index: int, seed: int, preset: Preset, output: Path, device: torch.device, **more: Any
) -> Any:
    """Return a run's NashConfig: common updates, prompts, answers and learning rate, the contestant's options at the
    tau of this index of its grid. Runs of one seed have the same prompts and noise at every tau."""
    options: dict[str, Any] = {
        "max_steps": preset.updates,
        "per_device_train_batch_size": preset.prompts_per_update,
        "per_device_eval_batch_size": preset.batch,
        "samples_per_prompt": preset.samples_per_prompt,
        "max_prompt_length": preset.prompt_tokens,
        "max_new_tokens": preset.answer_tokens,
        "learning_rate": preset.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": max(1, preset.updates // 20),
        "eval_strategy": "steps",
        "eval_steps": max(1, preset.updates // preset.evaluations),
        "eval_prompts": preset.batch,
        "logging_steps": max(1, preset.updates // 40),  # points of a curve
        "log_samples": 0,
        "bf16": preset.bfloat16,
        "seed": 1000 * preset.seed + seed,
    }
    own = CONTESTANTS[contestant].options(preset, index)
    return NashConfig(str(output), **{**silent_options(device), **options, **own, **more})


class Rewards:
    """The reward of the RLHF baseline: the reward model's score of an answer."""

    def __init__(self, model: Any, batch: int) -> None:
        if not isinstance(model, RewardModel):
            raise TypeError(f"experiment: rewards: expected a reward model; got {type(model).__name__}")
        self.model, self.batch = model, batch

    def __call__(self, prompts: Any, responses: Any) -> torch.Tensor:
        return self.model.rewards(prompts, responses, self.batch)


def make_trainer(
    config: Any, judge: Judge | None, reward: Reward | None, setting: Setting, callbacks: Sequence[Any] = (),
    policy: Any = None,
) -> Any:  # fmt: skip
    """Return a trainer that starts from `policy`, or from the supervised policy if it is None."""
    return NashTrainer(
        policy or setting.fresh_policy(),
        setting.fresh_policy(),
        judge=judge,
        args=config,
        train_dataset=[{"prompt": row.prompt} for row in setting.corpus.train],
        eval_dataset=[{"prompt": row.prompt} for row in setting.corpus.test],
        processing_class=setting.corpus.tokenizer,
        callbacks=list(callbacks),
        reward=reward if config.algorithm_spec.judged_by == "reward" else None,
    )


def make_run(
    work: Path, contestant: str, index: int, seed: int, judge: Judge, reward: Rewards, setting: Setting
) -> None:
    config = configuration(contestant, index, seed, setting.preset, work / "trainer", setting.device)
    with setting.reporter.bar(f"{label(contestant)}, tau {config.tau:g}", setting.preset.updates) as advance:
        trainer = make_trainer(config, judge, reward, setting, [AfterStep(advance)])
        train_silently(trainer)
    save_policy(trainer.model, setting.corpus.tokenizer, work / "policy")
    write_json(work / "history.json", [_finite(entry) for entry in trainer.state.log_history])


def _finite(entry: dict[str, Any]) -> dict[str, float]:
    """Return the finite logged numbers (JSON has no infinity), rounded to five digits, enough for a curve."""
    values = {name: entry[name] for name in entry if name in LOGGED or name.startswith("eval_")}
    return {name: float(f"{value:.5g}") for name, value in values.items() if abs(value) < float("inf")}
