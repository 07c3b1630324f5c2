"""NashTrainer: transformers' Trainer whose batches are sampled answers to prompts and whose loss is a fused one.

An update, in order: `get_batch_samples` samples and judges answers to the prompts of all its micro-batches;
`training_step` computes the loss and gradients of one of them; callbacks check the gradients before the optimizer
step and update the opponent after it. All randomness is a function of (seed, update, prompt).

What a subclass may override: `SCHEDULES`, `COLLECTOR`, `rollout_settings` and `read_eval_dataset`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from transformers import ProgressCallback, TrainerCallback

from ..core.loading import not_finite
from ..core.settings import use_backend
from ..core.upstream import accepting_split_models, finite_attention_gradients
from ..engine import RolloutEngine, RolloutResult, RolloutSettings
from ..preference import Judge
from . import samples
from .accelerate_fsdp import accept_sharded, plugin_accelerator, shard
from .callbacks import OptimizerHooks, Progress
from .config import NashConfig
from .evaluation import Evaluator
from .experience import Experience, ExperienceCollector
from .heads import check_head
from .layout import Layout
from .losses import PolicyLoss
from .meters import Meters, PhaseTimer
from .opponents import Opponent, RolloutPolicy, gathered_opponent
from .processes import DataParallel
from .prompts import PromptCollator, PromptDataset, check_vocabulary, special_tokens
from .resumable import ResumableTrainer
from .rewards import Reward
from .schedules import value_at
from .setup import (
    OP,
    broadcast_weights,
    check_batches,
    check_best_metric,
    check_judges,
    check_layout,
    check_precision,
    check_processes,
    freeze_for_rollouts,
    gather_for_rollouts,
    make_opponent,
    naming_arguments,
    rollout_dtype,
    with_reference,
    without_dropout,
)
from .sharded import GatheredModel, average_split_gradients

_log = logging.getLogger(__name__)


class NashTrainer(ResumableTrainer):
    """Train `model` towards answers that `judge` prefers to those of the opponent of `args.algorithm`.

    Models that are not trained are frozen and moved to the device, with `args.bf16` or `args.fp16` in that dtype; the
    trainer does not change them otherwise.

    Args:
        model: causal language model, or a peft model around one, whose adapter is trained further.
        reference_model: likewise, mu of the KL penalty; None: the base where there are adapters, else a frozen copy
            of `model` as it is now.
        judge: (prompts, first, second) -> P(first preferred), as in `nlhf_kernels.preference`; optional for "rlhf".
        args: the configuration.
        train_dataset: rows with a column `prompt`: texts, or lists of chat messages.
        eval_dataset: likewise, or a mapping of names to such.
        processing_class: the tokenizer, with an end and a padding token.
        peft_config: configuration of adapters to put on `model`.
        callbacks: callbacks of transformers' Trainer.
        reward: (prompts, responses) -> numbers, maximised by "rlhf" and measured in evaluations.
        eval_opponent: a model that the policy is compared with in evaluations, beside the reference.
        optimizers: optimizer and learning-rate scheduler, as in transformers' Trainer.
    """

    SCHEDULES: ClassVar[Mapping[str, str]] = MappingProxyType({"beta": "beta", "tau": "tau"})  # -> names in logs
    COLLECTOR: ClassVar[type[ExperienceCollector]] = ExperienceCollector

    def __init__(
        self,
        model: Any,
        reference_model: Any = None,
        judge: Judge | None = None,
        args: NashConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        *,
        reward: Reward | None = None,
        eval_opponent: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if not isinstance(args, NashConfig):
            raise TypeError(f"{OP}: args: expected a NashConfig; got {type(args).__name__}")
        check_judges(args, judge, reward)
        others = {"reference_model": reference_model, "eval_opponent": eval_opponent}
        if (plugin := plugin_accelerator(args)) is not None:
            model, peft_config = shard(plugin, args, model, peft_config, *others.values()), None
        self.layout: Layout = check_layout(args, model, **others)
        end_ids, pad_id = special_tokens(processing_class, model)
        model, reference_model = with_reference(
            model, reference_model, peft_config, args.seed, split=self.layout.sharded
        )
        check_vocabulary(processing_class, check_head(model, "model"))
        if reference_model is not None and args.kl == "exact":
            check_head(reference_model, "reference_model")
        self.make_dataset: Callable[..., PromptDataset] = partial(
            PromptDataset, tokenizer=processing_class, max_length=args.max_prompt_length
        )
        with accepting_split_models(args) if self.layout.sharded and plugin is None else nullcontext():
            super().__init__(
                model=model,
                args=args,
                data_collator=PromptCollator(pad_id),
                train_dataset=None if train_dataset is None else self.make_dataset("train_dataset", train_dataset),
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
            )
        if plugin is not None:
            accept_sharded(self.accelerator)
        self.processes: DataParallel = DataParallel(self.accelerator, self.layout)
        check_processes(args, self.accelerator, self.processes, self._all_prompts())
        check_batches(args, self.processes, self.train_dataset)
        check_precision(args, self.accelerator, self.model)
        judge, reward = self.processes.ask_once(judge), self.processes.ask_once(reward)
        self._prepare_models(args, reference_model, eval_opponent)
        self._check_room()
        self.meters: Meters = Meters()  # means of what is logged
        self.timer: PhaseTimer = PhaseTimer(args.device)
        settings = self.rollout_settings(end_ids, pad_id)
        self.collector: ExperienceCollector = self._make_collector(settings, judge, reward)
        self.evaluator: Evaluator = self._make_evaluator(settings, judge, reward)
        if self.evaluation_prompts is not None:
            check_best_metric(args, self._metric_names())
        self.experiences: list[Experience] = []  # the latest update's, one for each micro-batch
        self.scheduled_values: dict[str, float] = {}  # beta and tau of the latest update
        self.skipped_updates: int = 0  # updates without a step, as their gradients were not finite
        self.scale_of_step: float = 0.0  # the gradient scaler's, of the latest update; 0: no scaler
        self.gradients_done_at: float = 0.0  # time.perf_counter() after the latest backward pass
        self.add_callback(OptimizerHooks(self))
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(Progress())

    def _prepare_models(self, args: NashConfig, reference_model: Any, eval_opponent: Any) -> None:
        """Create the models of rollouts, their engines, and the loss."""
        dtype = rollout_dtype(args)
        if self.layout.sharded:
            self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True  # else gradients add up unsplit
            average_split_gradients(self.model, self.layout)
            reference_model, eval_opponent = gather_for_rollouts(args, self.model, reference_model, eval_opponent)
        else:
            freeze_for_rollouts(args, reference_model, eval_opponent)
            broadcast_weights(self.model, reference_model, eval_opponent)  # before opponents are copied from them
        self.rollout_policy: RolloutPolicy | GatheredModel
        self.opponent: Opponent | None
        self._gathered: list[GatheredModel] = []  # of split models, whose weights are gathered before rollouts
        if self.layout.sharded:
            self.rollout_policy = GatheredModel(self.model, dtype)
            self.opponent, *beside = gathered_opponent(self.model, dtype, args)
            self._gathered = [self.rollout_policy, *(each for each in beside if each is not None)]
            opponent, anchor = (None if each is None else each.model for each in beside)
        else:
            self.rollout_policy = RolloutPolicy(self.model, dtype)
            self.opponent, anchor = make_opponent(self.model, dtype, args)
            opponent = None if self.opponent is None else self.opponent.rollout_weights
        with naming_arguments():
            self.engine: RolloutEngine = RolloutEngine(
                self.rollout_policy.model, reference_model, opponent=opponent, compile=args.compile_rollouts, op=OP
            )
        self.eval_opponent_engine: RolloutEngine | None = None
        if eval_opponent is not None:
            self.eval_opponent_engine = RolloutEngine(
                eval_opponent, compile=args.compile_rollouts, op=f"{OP}: eval_opponent"
            )
        self.policy_loss: PolicyLoss = PolicyLoss(args, self.model, reference_model, anchor)

    def rollout_settings(self, end_ids: tuple[int, ...], pad_id: int) -> RolloutSettings:
        """Return how training samples answers; evaluations replace the temperature.

        Args:
            end_ids: tokens that end an answer.
            pad_id: token that fills rows after the end.
        """
        args = self.args
        return RolloutSettings(
            max_new_tokens=args.max_new_tokens,
            min_new_tokens=args.min_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            end_ids=end_ids,
            pad_id=pad_id,
            logprobs=("policy", "reference"),
            backend=args.backend,
        )

    def _check_room(self) -> None:
        """Check that the longest prompt and its answer fit the models' positions."""
        for name, dataset in self._all_prompts().items():
            longest = max(len(prompt.ids) for prompt in dataset.prompts)
            try:
                for engine in (self.engine, self.eval_opponent_engine):
                    if engine is not None:
                        engine.models.check_length(longest, self.args.max_new_tokens)
            except ValueError as error:
                raise ValueError(f"{error} ({name})") from error

    def _all_prompts(self) -> dict[str, PromptDataset]:
        datasets = {} if self.train_dataset is None else {"train_dataset": self.train_dataset}
        if isinstance(self.evaluation_prompts, Mapping):
            return datasets | {f"eval_dataset[{name!r}]": part for name, part in self.evaluation_prompts.items()}
        return datasets if self.evaluation_prompts is None else datasets | {"eval_dataset": self.evaluation_prompts}

    def _make_collector(
        self, settings: RolloutSettings, judge: Judge | None, reward: Reward | None
    ) -> ExperienceCollector:
        return self.COLLECTOR(
            self.args,
            self._current_rollout(self.engine),
            self.processing_class,
            settings,
            reward if self.args.algorithm_spec.judged_by == "reward" else judge,
            self.processes.total,
            self.meters,
            self.timer,
        )

    def _make_evaluator(self, settings: RolloutSettings, judge: Judge | None, reward: Reward | None) -> Evaluator:
        eval_opponent_rollout = None
        if self.eval_opponent_engine is not None:
            eval_opponent_rollout = self._current_rollout(self.eval_opponent_engine, logprobs=())
        return Evaluator(
            self.args,
            self._current_rollout(self.engine),
            eval_opponent_rollout,
            self.processing_class,
            settings,
            self.data_collator,
            judge,
            reward,
            self.processes,
        )

    def _metric_names(self) -> list[str]:
        parts = (
            [f"{part}_" for part in self.evaluation_prompts] if isinstance(self.evaluation_prompts, Mapping) else [""]
        )
        return [f"eval_{part}{name}" for part in parts for name in self.evaluator.metric_names()]

    # ---- an update ---------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], float | None]:
        """Return the micro-batches of an update with their experiences, and the normalizer of their losses.

        The normalizer is the number of pairs of the whole update, divided by the number of groups of processes that
        read rows of their own, because averaging gradients over those groups divides by that number.

        Args:
            epoch_iterator: batches of prompts, as `PromptCollator` makes them.
            num_batches: micro-batches of an update.
            device: where the count of pairs is summed.
        """
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return [], None
        self.scheduled_values = {name: self.scheduled_value(name) for name in self.SCHEDULES}
        self.gather_weights()
        updates = max(1, self.state.max_steps - self.state.global_step)
        self.engine.rollouts_to_come = updates * len(batches)
        with self.abandonable():
            self.experiences = self.collector(batches, self.state.global_step, self.scheduled_values["beta"])
        pairs = torch.tensor(sum(part.pairs for part in self.experiences), dtype=torch.float32, device=device)
        inputs = [{"input_ids": part.input_ids, "experience": part} for part in self.experiences]
        return inputs, float(self.processes.total(pairs)) / self.processes.groups

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Compute the loss of one micro-batch and add its gradients.

        Args:
            model: the policy in the wrapper that trains it.
            inputs: a micro-batch of `get_batch_samples`.
            num_items_in_batch: the normalizer of `get_batch_samples`.
        """
        with self.timer.phase("loss"), without_dropout(model), finite_attention_gradients():
            with self.accelerator.autocast():
                tau = self.scheduled_values["tau"]
                loss = self.policy_loss(model, inputs["experience"], tau, num_items_in_batch)
            self.accelerator.backward(loss)
        self.gradients_done_at = time.perf_counter()
        return loss.detach()

    def scheduled_value(self, name: str) -> float:
        """Return the value of a schedule for the current update.

        Args:
            name: "beta" or "tau".
        """
        fixed = self.args.algorithm_spec.beta if name == "beta" else None
        if fixed is not None:
            return float(fixed)
        return value_at(name, getattr(self.args, name), self.state.global_step, self.state.epoch or 0.0)

    def before_optimizer(self) -> None:
        """Drop gradients that are not finite, so that the optimizer step changes nothing, or end the run.

        With a gradient scaler (`fp16`) they are due to a scale that is too large: it skips the step and halves the
        scale. At a scale of 1 that is not the cause, and `nonfinite` decides as it does without a scaler.
        """
        scaler = self.accelerator.scaler
        self.scale_of_step = 0.0 if scaler is None else scaler.get_scale()
        gradients = [value.grad for value in self.model.parameters() if value.grad is not None]
        if not gradients or self.processes.all_finite(gradients):
            return
        update = f"{OP}: update {self.state.global_step}"
        if (name := not_finite(self.model)) is not None:  # then the gradients of all later updates are not finite
            hint = "a lower learning_rate, and on from the last checkpoint"
            raise FloatingPointError(f"{update}: expected finite weights; got NaN or infinity in {name} ({hint})")
        if self.scale_of_step > 1:
            return  # the scaler skips the step
        what = f"{update}: expected finite gradients; got NaN or infinity"
        if self.args.nonfinite == "stop":
            raise FloatingPointError(what)
        _log.warning("%s; the update is skipped", what)
        if scaler is None:  # else the scaler skips the step, and `after_optimizer_step` counts it
            self.skipped_updates += 1
            self.model.zero_grad()

    def after_optimizer_step(self) -> None:
        """Count a step that the gradient scaler skipped, and keep its scale at 1 or above.

        A lower scale shows that the step was skipped; accelerate does not detect it with a fused optimizer.
        """
        scaler = self.accelerator.scaler
        if scaler is None or scaler.get_scale() >= self.scale_of_step:
            return
        self.skipped_updates += 1
        if scaler.get_scale() < 1:
            scaler.update(1.0)
        _log.info(
            "%s: update %d: gradients overflow in float16; the update is skipped, the next ones are scaled by %g",
            OP, self.state.global_step, scaler.get_scale(),
        )  # fmt: skip

    def after_optimizer(self) -> None:
        """Update the opponent's weights from the policy's."""
        if self.opponent is not None:
            self.opponent.update(self.state.global_step)
        self.timer.add("optimizer", self.gradients_done_at)

    def _current_rollout(self, engine: RolloutEngine, **changes: Any) -> Callable[..., RolloutResult]:
        """Return the engine's rollout with the policy's current weights, its settings replaced by `changes`."""

        def rollout(ids: Any, mask: Any, players: Any, settings: RolloutSettings) -> RolloutResult:
            if isinstance(self.rollout_policy, RolloutPolicy) and self.rollout_policy.refresh():
                self.engine.release()  # captured steps read the weights' old memory
            backend = self.args.backend  # of attention too, which has no argument for it
            with nullcontext() if backend is None else use_backend(backend):
                return engine.rollout(ids, mask, players, replace(settings, **changes))

        return rollout

    def gather_weights(self) -> None:
        """Copy current weights into the gathered models, once before an update's rollouts or an evaluation, because
        the number of rollouts differs between processes."""
        for model in self._gathered:
            model.refresh()

    # ---- logs and evaluation -----------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as transformers' Trainer does; a training log gets the means, times, schedules and samples.

        Args:
            logs: names and values.
            start_time: when training began, for rates.
        """
        if "loss" in logs:  # a training log, not an evaluation's
            logs |= self.meters.means(self.processes) | self.timer.report(self.processes)
            logs |= {self.SCHEDULES[name]: value for name, value in self.scheduled_values.items()}
            logs |= {"skipped_updates": self.skipped_updates}
            if self.accelerator.scaler is not None:
                logs |= {"loss_scale": self.accelerator.scaler.get_scale()}
            if self.args.log_samples and self.is_world_process_zero():
                table = samples.samples_of(self.experiences[0], self.args.log_samples, self.args.samples_per_prompt)
                samples.show(table, self.state.global_step)
                samples.report(table, self.state.global_step, self.callback_handler.callbacks)
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the evaluation's metrics: win rates, rewards, KL, entropy and lengths.

        Args:
            eval_dataset: rows with a column `prompt`, or a mapping of names to such; None: the constructor's.
            ignore_keys: transformers' argument, without meaning here: there are no predictions.
            metric_key_prefix: of the metrics' names.
        """
        prompts = self.evaluation_prompts if eval_dataset is None else self.read_eval_dataset(eval_dataset)
        if prompts is None:
            raise ValueError(f"{OP}: evaluate: expected an eval_dataset; got none")
        metrics: dict[str, float] = {}
        parts = prompts if isinstance(prompts, Mapping) else {"": prompts}
        self.gather_weights()
        with self.abandonable():
            for name, part in parts.items():
                metrics |= self.evaluator(part, f"{metric_key_prefix}_{name}".rstrip("_"))
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *_: Any, **__: Any) -> Any:
        """Raise: transformers' predictions are a model's outputs for rows with labels."""
        raise NotImplementedError(f"{OP}: predict: expected evaluate(), or RolloutEngine for answers to prompts")

    @property
    def eval_dataset(self) -> Any:
        """The rows as the caller passed them. Setting it reads their prompts into `evaluation_prompts`."""
        return self._eval_dataset

    @eval_dataset.setter
    def eval_dataset(self, rows: Any) -> None:
        self.evaluation_prompts, self._eval_dataset = self.read_eval_dataset(rows), rows

    def read_eval_dataset(self, rows: Any) -> Any:
        """Return the tokenised prompts of rows, or of every part of a mapping (a datasets.DatasetDict is one).

        Args:
            rows: rows with a column `prompt`, or a mapping of names to such; None: there are none.
        """
        first = self.args.eval_prompts
        if isinstance(rows, Mapping):
            return {
                name: self.make_dataset(f"eval_dataset[{name!r}]", part, first=first) for name, part in rows.items()
            }
        return None if rows is None else self.make_dataset("eval_dataset", rows, first=first)
