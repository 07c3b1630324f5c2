"""NashTrainer: transformers' Trainer, whose batches are answers to prompts and whose loss is a fused one.

An update, in order: `get_batch_samples` has the prompts of all its micro-batches answered and judged;
`training_step` takes one of them to a loss and its gradients; callbacks look at the gradients before the optimizer
does, and move the opponent after it. Everything random is a function of (seed, update, prompt).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from types import MappingProxyType
from typing import Any

import torch
from transformers import ProgressCallback, TrainerCallback

from ..core.loading import check_finite, not_finite
from ..core.settings import use_backend
from ..core.upstream import finite_attention_gradients
from ..engine import RolloutEngine, RolloutResult, RolloutSettings
from ..preference import Judge
from . import opponents, samples
from .callbacks import Progress, Updates
from .config import NashConfig
from .evaluation import Evaluator
from .experience import Collector, Experience
from .heads import check_head
from .losses import Learner
from .meters import Clock, Meters
from .prompts import Collator, PromptDataset, check_vocabulary, special_tokens
from .resumable import ResumableTrainer
from .rewards import Reward
from .schedules import value_at
from .setup import (
    OP,
    broadcast_weights,
    check_judges,
    check_processes,
    naming_arguments,
    opponent_of,
    with_reference,
    without_dropout,
)

_log = logging.getLogger(__name__)


class NashTrainer(ResumableTrainer):
    """Trains `model` against an opponent (`args.algorithm` says which) as `judge` prefers.

    model             causal language model, or a peft model around one, whose adapter is trained further
    reference_model   likewise; None: the base where there are adapters, else a frozen copy of `model` as it is now
    judge             (prompts, first, second) -> P(first preferred), as in `preference`; optional for "rlhf"
    reward            (prompts, responses) -> numbers; what "rlhf" climbs
    train_dataset     rows with a column `prompt`: texts, or lists of chat messages
    eval_dataset      likewise, or a mapping of names to such
    eval_opponent     a model that the policy is compared with in evaluations, beside the reference
    peft_config       adapters to put on `model`

    Models that only play are frozen and moved to the device, with `args.bf16` in bfloat16; they are yours otherwise.
    """

    SCHEDULES = MappingProxyType({"beta": "beta", "tau": "tau"})  # by their names in logs

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
        ends, pad = special_tokens(processing_class, model)
        model, reference_model = with_reference(model, reference_model, peft_config, args.seed)
        check_vocabulary(processing_class, check_head(model, "model"))
        if reference_model is not None and args.kl == "exact":
            check_head(reference_model, "reference_model")
        self.reads = partial(PromptDataset, tokenizer=processing_class, max_length=args.max_prompt_length)
        super().__init__(
            model=model,
            args=args,
            data_collator=Collator(pad),
            train_dataset=None if train_dataset is None else self.reads("train_dataset", train_dataset),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        check_processes(args, self.accelerator, self._all_prompts())
        self.meters, self.clock, self.skipped = Meters(), Clock(args.device), 0
        self._build_players(args, reference_model, eval_opponent)
        settings = RolloutSettings(
            max_new_tokens=args.max_new_tokens,
            min_new_tokens=args.min_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            end_ids=ends,
            pad_id=pad,
            logprobs=("policy", "reference"),
            backend=args.backend,
        )
        self._build_judged(args, settings, judge, reward)
        self._check_fit(args)
        self.add_callback(Updates(self))
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(Progress())

    def _build_players(self, args: NashConfig, reference: Any, eval_opponent: Any) -> None:
        """Everyone who answers prompts, and the one who learns."""
        dtype = torch.bfloat16 if args.bf16 else None  # None: everyone's own
        place: dict[str, Any] = {"device": args.device} | ({} if dtype is None else {"dtype": dtype})
        for part in (reference, eval_opponent):
            if part is not None:
                part.requires_grad_(False).eval().to(**place)
        if eval_opponent is not None:
            check_finite(f"{OP}: eval_opponent", eval_opponent)
        broadcast_weights(self.model, reference, eval_opponent)  # before opponents are copied from them
        self.played = opponents.Played(self.model, dtype)
        self.opponent, anchor = opponent_of(self.model, dtype, args)
        beside = None if self.opponent is None else self.opponent.played
        compiled = args.compile_rollouts
        with naming_arguments():
            self.engine = RolloutEngine(self.played.model, reference, opponent=beside, compile=compiled, op=OP)
        self.saved = None
        if eval_opponent is not None:
            self.saved = RolloutEngine(eval_opponent, compile=compiled, op=f"{OP}: eval_opponent")
        self.learner = Learner(args, self.model, reference, anchor)

    def _check_fit(self, args: NashConfig) -> None:
        for name, prompts in self._all_prompts().items():
            longest = max(len(prompt.ids) for prompt in prompts.prompts)
            try:
                for engine in (self.engine, self.saved):
                    if engine is not None:
                        engine.ensemble.check_room(longest, args.max_new_tokens)
            except ValueError as error:
                raise ValueError(f"{error} ({name})") from error

    def _all_prompts(self) -> dict[str, PromptDataset]:
        found = {} if self.train_dataset is None else {"train_dataset": self.train_dataset}
        evaluated = self.evaluation_prompts
        if isinstance(evaluated, Mapping):
            return found | {f"eval_dataset[{name!r}]": part for name, part in evaluated.items()}
        return found if evaluated is None else found | {"eval_dataset": evaluated}

    def _build_judged(
        self, args: NashConfig, settings: RolloutSettings, judge: Judge | None, reward: Reward | None
    ) -> None:
        """What answers are made and judged for: learning, and evaluations."""
        rollout, tokenizer = self._playing(self.engine), self.processing_class
        judged = reward if args.plan.judged_by == "reward" else judge
        self.collect = Collector(args, rollout, tokenizer, settings, judged, self._total, self.meters, self.clock)
        saved = None if self.saved is None else self._playing(self.saved, logprobs=())
        self.judged = Evaluator(
            args, rollout, saved, tokenizer, settings, self.data_collator, judge, reward, self.accelerator
        )

    # ---- an update ---------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], float | None]:
        """The micro-batches of an update, and what their losses are divided by: its pairs, on all processes. The
        division by their number that averaging over processes does is undone here."""
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return [], None
        self.scheduled = {name: self._scheduled(name) for name in self.SCHEDULES}
        with self.abandonable():
            self.made = self.collect(batches, self.state.global_step, self.scheduled["beta"])
        pairs = torch.tensor(sum(made.pairs for made in self.made), dtype=torch.float32, device=device)
        inputs = [{"input_ids": made.input_ids, "made": made} for made in self.made]
        return inputs, float(self._total(pairs)) / self.accelerator.num_processes

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        made: Experience = inputs["made"]
        with self.clock.phase("loss"), without_dropout(model), finite_attention_gradients():
            with self.accelerator.autocast():
                loss = self.learner.loss(model, made, self.scheduled["tau"], num_items_in_batch)
            self.accelerator.backward(loss)
        self.gradients_done = time.perf_counter()
        return loss.detach()

    def _scheduled(self, name: str) -> float:
        """beta or tau for the update that is being made."""
        fixed = self.args.plan.beta if name == "beta" else None
        if fixed is not None:
            return float(fixed)
        return value_at(name, getattr(self.args, name), self.state.global_step, self.state.epoch or 0.0)

    def before_optimizer(self) -> None:
        """Gradients that are not finite are dropped, so that the optimizer finds nothing to do, or end the run."""
        gradients = [value.grad for value in self.model.parameters() if value.grad is not None]
        if not gradients or bool(torch.nn.utils.get_total_norm(gradients).isfinite()):
            return
        update = f"{OP}: update {self.state.global_step}"
        if (name := not_finite(self.model)) is not None:  # then no later update would be another
            hint = "a lower learning_rate, and on from the last checkpoint"
            raise FloatingPointError(f"{update}: expected finite weights; got NaN or infinity in {name} ({hint})")
        what = f"{update}: expected finite gradients; got NaN or infinity"
        if self.args.nonfinite == "stop":
            raise FloatingPointError(what)
        _log.warning("%s; the update is skipped", what)
        self.skipped += 1
        self.model.zero_grad()

    def after_optimizer(self) -> None:
        if self.opponent is not None:
            self.opponent.update(self.state.global_step)
        self.clock.ended("optimizer", self.gradients_done)

    def _playing(self, engine: RolloutEngine, **changed: Any) -> Any:
        """The engine's rollouts, with the weights of now."""

        def rollout(ids: Any, mask: Any, players: Any, settings: RolloutSettings) -> RolloutResult:
            if self.played.refresh():
                self.engine.release()  # recorded steps read the old place
            with self._kernels():  # attention's too, which has no argument for it
                return engine.rollout(ids, mask, players, replace(settings, **changed))

        return rollout

    def _kernels(self) -> AbstractContextManager[None]:
        return nullcontext() if self.args.backend is None else use_backend(self.args.backend)

    def _total(self, value: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = self.accelerator.reduce(value, reduction="sum")
        return total

    # ---- logs and evaluation -----------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training log, not an evaluation's
            logs |= self.meters.means(self.accelerator) | self.clock.report(self.accelerator)
            logs |= {self.SCHEDULES[name]: value for name, value in self.scheduled.items()}
            logs |= {"skipped_updates": self.skipped}
            if self.args.log_samples and self.is_world_process_zero():
                table = samples.samples_of(self.made[0], self.args.log_samples, self.args.samples_per_prompt)
                samples.show(table, self.state.global_step)
                samples.report(table, self.state.global_step, self.callback_handler.callbacks)
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        chosen = self.evaluation_prompts if eval_dataset is None else self._evaluated(eval_dataset)
        if chosen is None:
            raise ValueError(f"{OP}: evaluate: expected an eval_dataset; got none")
        metrics: dict[str, float] = {}
        named = chosen if isinstance(chosen, Mapping) else {"": chosen}
        with self.abandonable():
            for name, prompts in named.items():
                metrics |= self.judged(prompts, f"{metric_key_prefix}_{name}".rstrip("_"))
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @property
    def eval_dataset(self) -> Any:
        """What was given. Setting it reads its prompts into `evaluation_prompts`, as the constructor does."""
        return self._eval_dataset

    @eval_dataset.setter
    def eval_dataset(self, rows: Any) -> None:
        self.evaluation_prompts, self._eval_dataset = self._evaluated(rows), rows

    def _evaluated(self, rows: Any) -> Any:
        """The prompts of rows, or of every part of a mapping (a datasets.DatasetDict is one)."""
        first = self.args.eval_prompts
        if isinstance(rows, Mapping):
            return {name: self.reads(f"eval_dataset[{name!r}]", part, first=first) for name, part in rows.items()}
        return None if rows is None else self.reads("eval_dataset", rows, first=first)
