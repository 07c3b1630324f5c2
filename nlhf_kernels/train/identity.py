"""The identity of a run: everything that changes its result, compared with the checkpoint that it resumes from.

Settings are compared by value, models by digests of their weights, judges and rewards by name and source, prompts by a
digest. Options that only change speed, logs or the moment of saving are left out, as is the length of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..core.identity import adapter_settings, as_json, describe, start_digest, weights_digest
from ..engine.peft_models import is_adapted
from . import opponents
from .config import FIXED, defaults, own_fields

OP = "NashTrainer"
Identity = dict[str, Any]
#: Fields of NashConfig that do not change what is learned.
NEUTRAL = (
    "backend", "compile_rollouts", "eval_temperature", "eval_samples_per_prompt", "eval_prompts", "log_samples",
    "nonfinite", "overwrite_output_dir", "resume_changes", "tp_size", "fsdp_size", "dp_replicate_size",
)  # fmt: skip
#: Fields of transformers' TrainingArguments that do.
OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args")
TRAINING = (
    "bf16", "fp16", "data_seed", "dataloader_drop_last", "lr_scheduler_kwargs", "lr_scheduler_type", "max_grad_norm",
    "train_sampling_strategy", "seed", "warmup_steps",
)  # fmt: skip
#: What a checkpoint stores the state of, so that a resumed run cannot change it.
STORED = ("algorithm", "trained_parameters", "adapters", *OPTIMIZER)


def fields_of_a_run() -> tuple[str, ...]:
    """Return the fields of NashConfig that change what is learned."""
    own = (entry.name for entry in own_fields())
    return (*(name for name in own if name not in NEUTRAL and name not in FIXED), *OPTIMIZER, *TRAINING)


def identity_of(trainer: Any) -> Identity:
    """Return the identity of a trainer's run; call it before the first update, with the initial weights."""
    args, model, reference = trainer.args, trainer.model, trainer.policy_loss.reference
    settings = args.to_dict()
    facts = {name: settings.get(name) for name in fields_of_a_run()}
    facts |= {name: describe(value) for name in ("beta", "tau") if callable(value := getattr(args, name))}
    facts |= {
        "prompts": trainer.train_dataset.digest(),
        "prompts_per_update": args.train_batch_size * args.gradient_accumulation_steps * trainer.processes.groups,
        "trained_parameters": sum(value.numel() for value in opponents.trainable_parameters(model).values()),
        "start": start_digest(model, adapted=is_adapted(model)),
        "reference": "the base" if reference is None else weights_digest(reference.named_parameters()),
        args.algorithm_spec.judged_by: describe(trainer.collector.judge),
        "adapters": adapter_settings(model),
    }
    identity: Identity = as_json(facts)
    return identity


def differences(stored_identity: Identity, identity: Identity) -> dict[str, str]:
    """Return name -> what differs, the checkpoint's value before this run's."""
    usual = defaults()
    before = {name: stored_identity.get(name, usual.get(name)) for name in identity}
    return {
        name: f"its {name} is {before[name]!r}, this run's is {value!r}"
        for name, value in identity.items()
        if before[name] != value
    }


def check_changes(changes: Sequence[str], identity: Identity) -> None:
    """Raise where `resume_changes` names what cannot differ."""
    for name in changes:
        if name in STORED or name not in identity:
            possible = ", ".join(sorted(identity.keys() - set(STORED)))
            why = "which the checkpoint holds the state of" if name in STORED else "which is nothing of a run"
            raise ValueError(f"{OP}: resume_changes: expected some of {possible}; got {name!r}, {why}")
