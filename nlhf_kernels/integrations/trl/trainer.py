"""NashMDTrainer: TRL 1.13's signature, on NashTrainer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch

from ...core.loading import load_model
from ...engine import RolloutSettings
from ...engine.peft_models import is_adapted
from ...train import NashTrainer
from .config import NashMDConfig
from .judging import PenalisingCollector, make_judge
from .rows import OP, Rows


class NashMDTrainer(NashTrainer):
    """Train `model` by Nash-MD. Arguments as in TRL; those that are not TRL 1.13's are keyword-only.

    `beta` and `mixture_coef`, of the trainer and of its logs, are TRL's. `args` of the trainer is the NashConfig that
    the NashMDConfig translates to; the latter stays in `trl_config`.

    Args:
        model: causal language model, a peft model around one, or a name for `from_pretrained`.
        ref_model: the reference; None: a frozen copy of `model`, or its base where `peft_config` adds adapters.
        reward_funcs: a reward model (or its name), a reward function, a list of them; or a judge.
        args: the configuration.
        data_collator: must be None: prompts are tokenised and padded here.
        train_dataset: rows with a column `prompt`: texts, or lists of chat messages.
        eval_dataset: likewise, or a mapping of names to such.
        processing_class: the tokenizer.
        peft_config: configuration of adapters to put on `model`.
        compute_metrics: must be None: evaluations sample answers.
        callbacks: callbacks of transformers' Trainer.
        optimizers: optimizer and learning-rate scheduler, as in transformers' Trainer.
        preprocess_logits_for_metrics: must be None: the logits are never computed.
        judge: instead of `reward_funcs`: (prompts, first, second) -> P(first preferred), an object with TRL's
            `judge(prompts, pairs)`, or a PairwisePreferenceModel.
        reward_processing_classes: tokenizers of the reward models; None: the one saved with a model, else the policy's.
    """

    SCHEDULES = MappingProxyType({"beta": "mixture_coef", "tau": "beta"})
    COLLECTOR = PenalisingCollector

    def __init__(
        self,
        model: Any = None,
        ref_model: Any = None,
        reward_funcs: Any = None,
        args: NashMDConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        compute_metrics: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Any = None,
        *,
        judge: Any = None,
        reward_processing_classes: Any = None,
    ) -> None:
        if not isinstance(args, NashMDConfig):
            kind = f"{type(args).__module__}.{type(args).__name__}"
            raise TypeError(f"{OP}: args: expected the NashMDConfig of {__package__}; got {kind}")
        _refuse("data_collator", data_collator, "prompts are tokenised and padded here")
        _refuse("compute_metrics", compute_metrics, "evaluations sample answers; there are no predictions")
        _refuse("preprocess_logits_for_metrics", preprocess_logits_for_metrics, "the logits are never made")
        if not (callable(processing_class) and hasattr(processing_class, "eos_token_id")):
            raise TypeError(f"{OP}: processing_class: expected a tokenizer; got {type(processing_class).__name__}")
        if getattr(processing_class, "pad_token", "") is None:
            processing_class.pad_token = processing_class.eos_token  # as TRL does; padding is masked
        self.trl_config = args
        self.rows = Rows(processing_class)
        comparison = make_judge(args, reward_funcs, judge, reward_processing_classes, processing_class, self.rows)
        self._reward_funcs = comparison.reward_funcs
        model = _load(model, args)
        if ref_model is None and peft_config is None and is_adapted(model):
            ref_model = copy.deepcopy(model)  # in its initial state, adapters included
        if isinstance(ref_model, torch.nn.Module) and isinstance(model, torch.nn.Module):
            ref_model.to(next(model.parameters()).dtype)  # TRL takes models of two dtypes, the engine those of one
        super().__init__(
            model=model,
            reference_model=ref_model,
            judge=comparison.judge,
            args=args.nash_config(comparison.penalty),
            train_dataset=None if train_dataset is None else self.rows.read("train_dataset", train_dataset),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            callbacks=callbacks,
            optimizers=optimizers,
        )

    @property
    def beta(self) -> float:
        """As in TRL: the coefficient of the KL penalty in the current update."""
        return self.scheduled_value("tau")

    @property
    def mixture_coef(self) -> float:
        """As in TRL: the reference's weight in the opponent in the current update."""
        return self.scheduled_value("beta")

    @property
    def ref_model(self) -> Any:
        """As in TRL: None where `peft_config` put adapters on the model, whose base is the reference."""
        return self.policy_loss.reference

    @property
    def reward_funcs(self) -> Any:
        """As in TRL: the reward function passed; a list where there are several, None beside `judge`."""
        return self._reward_funcs

    def create_model_card(
        self, model_name: Any = None, dataset_name: Any = None, tags: Any = None, **options: Any
    ) -> None:
        """Write the model's README.md.

        Args:
            model_name, dataset_name, tags: as in TRL.
            options: as in transformers.
        """
        super().create_model_card(model_name=model_name, tags=tags, **{"dataset": dataset_name, **options})

    def read_eval_dataset(self, rows: Any) -> Any:
        """Read rows by TRL's rules for conversations, then as NashTrainer does.

        Args:
            rows: rows with a column `prompt`, or a mapping of names to such; None: there are none.
        """
        if isinstance(rows, Mapping):
            texts: Any = {name: self.rows.read(f"eval_dataset[{name!r}]", part) for name, part in rows.items()}
        else:
            texts = None if rows is None else self.rows.read("eval_dataset", rows)
        return super().read_eval_dataset(texts)

    def rollout_settings(self, end_ids: tuple[int, ...], pad_id: int) -> RolloutSettings:
        """Return how training samples answers, with TRL's `min_p`.

        Args:
            end_ids: tokens that end an answer.
            pad_id: token that fills rows after the end.
        """
        return replace(super().rollout_settings(end_ids, pad_id), min_p=self.trl_config.sampling()["min_p"])


def _refuse(name: str, value: Any, reason: str) -> None:
    if value is not None:
        raise ValueError(f"{OP}: {name}: expected None, as {reason}; got {type(value).__name__}")


def _load(model: Any, args: NashMDConfig) -> Any:
    if isinstance(model, str):
        return load_model(f"{OP}: model", model, trainable=True, **args.init_options())
    if args.model_init_kwargs is not None:
        raise ValueError(f"{OP}: model_init_kwargs: expected with a model given by name; got {type(model).__name__}")
    return model
