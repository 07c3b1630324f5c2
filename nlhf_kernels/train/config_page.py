"""docs/configuration.md, written from the code: `nlhf-kernels train --keys`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from ..core.text import markdown_table
from .algorithms import ALGORITHMS
from .config import FIXED, defaults, own_fields
from .run_file import DataSpec, JudgeSpec, RewardSpec, RunFile

#: Those of transformers' options that most runs set, with their descriptions.
COMMON = {
    "output_dir": "checkpoints and the trained policy; must not hold another run's checkpoints",
    "per_device_train_batch_size": "prompts of a micro-batch, on every process",
    "gradient_accumulation_steps": "micro-batches of an update; their gradients are averaged",
    "max_steps": "updates; -1: num_train_epochs decides",
    "num_train_epochs": "passes through the prompts",
    "learning_rate": "of AdamW unless optim says otherwise",
    "lr_scheduler_type": "how the learning rate changes",
    "warmup_steps": "updates until the learning rate is full; below 1: a share of all",
    "max_grad_norm": "gradients are scaled down to this norm; 0: never",
    "bf16": "products in bfloat16, weights and sums in float32; rollouts play with a bfloat16 copy",
    "fp16": "likewise in float16, with a gradient scaler; updates that it skips are counted in the log",
    "seed": "of the order of prompts, and of every answer",
    "logging_steps": "updates between logs",
    "eval_strategy": "no, steps or epoch",
    "eval_steps": "updates between evaluations; none: logging_steps",
    "per_device_eval_batch_size": "prompts answered at once in evaluations",
    "save_strategy": "no, steps, epoch or best",
    "save_steps": "updates between checkpoints",
    "save_total_limit": "checkpoints kept; none: all",
    "load_best_model_at_end": "with metric_for_best_model, eval_win_rate_reference say",
    "report_to": "tensorboard, wandb and others that are installed; none: the terminal alone",
    "use_cpu": "train on the CPU although there is a GPU",
}


def configuration_page() -> str:
    own = {entry.name: (entry.default, entry.metadata["help"]) for entry in own_fields()}
    usual = defaults()
    parts = [
        "# Configuration",
        "Written by `nlhf-kernels train --keys`; a test holds this file to it. Keys that do not exist are "
        "refused with the nearest one, values of another type too.",
        "## The run file",
        "What `nlhf-kernels train --config run.yaml` reads. `nlhf-kernels train --example` prints one to begin with.",
        _table(_rows(RunFile)),
        f"`judge`, or every entry of it: {_first(JudgeSpec)}",
        _table(_rows(JudgeSpec)),
        f"`reward`: {_first(RewardSpec)}",
        _table(_rows(RewardSpec)),
        f"`data`: {_first(DataSpec)}",
        _table(_rows(DataSpec)),
        "## training: NashConfig",
        "The keys of `training`, and the arguments of `NashConfig` in Python. What an algorithm does not use "
        "is refused where it is not the default.",
        _table((name, _value(default), text) for name, (default, text) in own.items() if name not in FIXED),
        "`algorithm` is one of:",
        _table(
            ((a.name, a.loss.replace("-", " "), a.summary) for a in ALGORITHMS.values()),
            ("algorithm", "loss", "who plays"),
        ),
        "## training: what transformers' TrainingArguments bring",
        "All of them are there. Those that most runs set:",
        _table((name, _value(usual[name]), text) for name, text in COMMON.items()),
        "Activation checkpointing (`activation_checkpointing`; in older versions of transformers "
        "`gradient_checkpointing`) saves memory in training; rollouts keep their caches.",
        "These keep their defaults, since they would contradict what is done here or would not be looked at:",
        _table(((name, reason) for name, reason in FIXED.items()), ("key", "why")),
    ]
    return "\n\n".join(parts) + "\n"


def _rows(kind: Any) -> list[tuple[str, str, str]]:
    rows = []
    for entry in dataclasses.fields(kind):
        default = "needed" if entry.default is dataclasses.MISSING else _value(entry.default)
        rows.append((entry.name, default, entry.metadata["help"]))
    return rows


def _value(value: Any) -> str:
    value = getattr(value, "value", value)
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _first(kind: Any) -> str:
    text = " ".join((kind.__doc__ or "").split())
    return text[0].lower() + text[1:]


def _table(rows: Iterable[tuple[str, ...]], head: tuple[str, ...] = ("key", "default", "meaning")) -> str:
    return markdown_table(head, [(f"`{first}`", *rest) for first, *rest in rows])
