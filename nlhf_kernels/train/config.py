"""NashConfig: the options of a training run beside transformers' TrainingArguments, and all their checks."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass, field, fields
from typing import Any

from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

from ..core.checks import check_integer, check_number, check_option
from ..core.settings import CHOICES
from ..core.text import excerpt
from ..ops.nash_pg_loss.weights import KL_MODES
from .algorithms import ALGORITHMS, Algorithm
from .schedules import OP, Schedule, check_schedule

_NO_PREDICTIONS = "evaluations sample answers; there are no predictions to collect"
_SHARDED = "tp_size and fsdp_size share a model, or accelerate launch --use_fsdp"
_COMPILED = "the model's head is replaced during the forward pass, which a compiled graph cannot see"
_NO_LABELS = "there are no labels"
#: Options of TrainingArguments that must keep their defaults, because the trainer ignores or contradicts them ->
#: the reason.
FIXED = {
    "fp16_full_eval": "evaluations answer in the dtype of rollouts",
    "bf16_full_eval": "evaluations answer in the dtype of rollouts",
    "torch_compile": _COMPILED,
    "torch_compile_backend": _COMPILED,
    "torch_compile_mode": _COMPILED,
    "use_liger_kernel": "it replaces the forward pass that hidden states are read from",
    "liger_kernel_config": "it replaces the forward pass that hidden states are read from",
    "use_cache": "rollouts keep caches, training does not",
    "neftune_noise_alpha": "answers are scored by the distribution they were drawn from",
    "remove_unused_columns": "prompts are not the model's inputs",
    "label_smoothing_factor": _NO_LABELS,
    "label_names": _NO_LABELS,
    "average_tokens_across_devices": "losses are divided by the pairs of all processes, always",
    "include_num_input_tokens_seen": "the log has tokens_per_second",
    "auto_find_batch_size": "an update's prompts must not depend on free memory",
    "torch_empty_cache_steps": "rollouts keep their buffers",
    "length_column_name": "prompts have no such column",
    "ignore_data_skip": "a resumed run sees the data that an uninterrupted one would see",
    "ddp_find_unused_parameters": "the head's gradient is taken outside the model's forward pass",
    "fsdp": _SHARDED,
    "fsdp_config": _SHARDED,
    "deepspeed": "models are sharded by FSDP2 here, not by DeepSpeed",
    "parallelism_config": _SHARDED,
    "enable_jit_checkpoint": "SIGTERM is answered with a checkpoint as it is",
    "push_to_hub": "a checkpoint gets its name when it is complete; NashTrainer.push_to_hub sends the finished model",
    "hub_always_push": "nothing is pushed during training",
    "prediction_loss_only": _NO_PREDICTIONS,
    "eval_accumulation_steps": _NO_PREDICTIONS,
    "eval_do_concat_batches": _NO_PREDICTIONS,
    "eval_use_gather_object": _NO_PREDICTIONS,
    "include_for_metrics": _NO_PREDICTIONS,
    "batch_eval_metrics": _NO_PREDICTIONS,
    "do_train": "call train()",
    "do_predict": "the engine and `nlhf-kernels sample` answer prompts",
}
SAMPLING = ("random", "sequential")  # orders of the training data
#: Numbers of TrainingArguments, which it does not check: name -> lowest value, and whether that one is excluded.
_NUMBERS = {
    "learning_rate": (0.0, False),
    "weight_decay": (0.0, False),
    "adam_beta1": (0.0, False),
    "adam_beta2": (0.0, False),
    "adam_epsilon": (0.0, True),
    "max_grad_norm": (0.0, False),
    "num_train_epochs": (0.0, True),
    "warmup_steps": (0.0, False),
    "logging_steps": (0.0, True),
    "eval_steps": (0.0, True),
    "save_steps": (0.0, True),
    "eval_delay": (0.0, False),
}
_COUNTS = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_steps": -1,
    "save_total_limit": 1,
    "dataloader_num_workers": 0,
}


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class NashConfig(TrainingArguments):
    """transformers' TrainingArguments, whose options keep their meaning, and the options of Nash learning."""

    algorithm: str = field(default="nash-md", metadata=_help("one of " + ", ".join(ALGORITHMS)))
    beta: Schedule = field(
        default=0.125,
        metadata=_help(
            "weight of the reference in the mixture that the opponent plays: a number, a list by epoch, {step: value} "
            "or a function of the step; nash-md and ipo-md"
        ),
    )
    tau: Schedule = field(
        default=0.01, metadata=_help("price of leaving the reference, per nat; a schedule like beta's")
    )
    kl: str = field(
        default="to_go",
        metadata=_help(
            "how the price is estimated: sequence (the paper's), to_go (less variance), exact (over the vocabulary, "
            "one pass of the reference more), token (biased; TRL up to 1.13); policy-gradient algorithms"
        ),
    )
    baseline: float | str | None = field(
        default=None,
        metadata=_help(
            "subtracted from the preference (or reward): a number, or batch for the mean of the batch's other rows; "
            "none: 0.5, and batch for rlhf; policy-gradient algorithms"
        ),
    )
    samples_per_prompt: int = field(default=1, metadata=_help("pairs of answers to every prompt"))
    max_prompt_length: int = field(
        default=512, metadata=_help("tokens; of longer prompts the last ones are kept, and the log says how many")
    )
    max_new_tokens: int = field(default=64, metadata=_help("tokens of an answer at most"))
    min_new_tokens: int = field(default=0, metadata=_help("no end token before"))
    temperature: float = field(
        default=1.0, metadata=_help("of sampling; log-probabilities trained on are those at temperature 1")
    )
    top_k: int = field(default=0, metadata=_help("sample from the k likeliest tokens; 0: all"))
    top_p: float = field(
        default=1.0, metadata=_help("sample from the likeliest tokens that hold this probability together; 1: all")
    )
    missing_eos_penalty: float = field(
        default=0.0, metadata=_help("taken off an answer's preference (or reward) where it has no end")
    )
    ema_decay: float = field(default=0.999, metadata=_help("nash-ema: weight of the old average at every update"))
    refresh_steps: int = field(default=50, metadata=_help("nash-mp: updates between refreshes of the snapshots"))
    anchor_weight: float = field(
        default=0.01, metadata=_help("nash-mp: price of leaving the anchor snapshot, per nat, beside tau")
    )
    nonfinite: str = field(
        default="skip", metadata=_help("an update whose loss or gradients are not finite: skip (and count) it, or stop")
    )
    backend: str | None = field(
        default=None, metadata=_help("of the kernels, as in use_backend; none: the fastest that can run")
    )
    compile_rollouts: bool | str = field(
        default=False,
        metadata=_help(
            "torch.compile for the models' steps in rollouts; takes a minute or more per number of rows; "
            "auto: once the updates to come are expected to repay it"
        ),
    )
    eval_temperature: float = field(
        default=1.0, metadata=_help("of sampling in evaluations; 0 takes the likeliest token")
    )
    eval_samples_per_prompt: int = field(default=1, metadata=_help("answers to every prompt in evaluations"))
    eval_prompts: int | None = field(
        default=None, metadata=_help("use the first so many prompts of the evaluation set; none: all")
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata=_help("start over: this trainer's checkpoints are removed, what others wrote stays"),
    )
    resume_changes: list[str] | None = field(
        default=None,
        metadata=_help(
            "what may differ from the run that is resumed: tau or judge, say; other differences are refused"
        ),
    )
    tp_size: int = field(
        default=1, metadata=_help("processes that share every matrix, within a node: tensor parallelism")
    )
    fsdp_size: int = field(
        default=1, metadata=_help("parts that weights, gradients and the optimizer's state are split into: FSDP2")
    )
    dp_replicate_size: int | None = field(
        default=None, metadata=_help("copies of all that; none: as many as there are processes for")
    )
    log_samples: int = field(default=2, metadata=_help("prompts with both answers shown at every log; 0: none"))

    remove_unused_columns: bool = field(
        default=False, metadata=_help("must stay false: prompts are not the model's inputs")
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata=_help("must stay false: the head is used outside of forward")
    )

    def __post_init__(self) -> None:
        check_option(OP, "algorithm", self.algorithm, tuple(ALGORITHMS))
        self._check_numbers()
        self._check_inherited()
        self._check_unused()
        self._check_fixed()
        if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
            raise ValueError(f"{OP}: deepspeed: expected None, as {FIXED['deepspeed']}; got a DeepSpeed launch")
        super().__post_init__()  # type: ignore[no-untyped-call]
        self._check_batches()
        check_integer(OP, "seed", self.seed, 0, 2**31 - 1)

    @property
    def algorithm_spec(self) -> Algorithm:
        """The row of ALGORITHMS that `algorithm` names."""
        return ALGORITHMS[self.algorithm]

    def _check_numbers(self) -> None:
        self.beta = check_schedule("beta", self.beta)
        self.tau = check_schedule("tau", self.tau, open_low=self.algorithm_spec.trains_pairs)
        check_option(OP, "kl", self.kl, KL_MODES)
        check_option(OP, "nonfinite", self.nonfinite, ("skip", "stop"))
        if self.compile_rollouts not in (True, False, "auto"):
            raise ValueError(
                f"{OP}: compile_rollouts: expected true, false or auto; got {excerpt(self.compile_rollouts)}"
            )
        if isinstance(self.baseline, str):
            check_option(OP, "baseline", self.baseline, ("batch",))
        elif self.baseline is not None:
            self.baseline = check_number(OP, "baseline", self.baseline)
        if self.backend is not None:
            check_option(OP, "backend", self.backend, CHOICES)
        whole = {"samples_per_prompt": 1, "max_prompt_length": 2, "max_new_tokens": 1, "min_new_tokens": 0, "top_k": 0}
        whole |= {"refresh_steps": 1, "eval_samples_per_prompt": 1, "log_samples": 0}
        for name, low in whole.items():
            check_integer(OP, name, getattr(self, name), low, 2**24)
        if self.eval_prompts is not None:
            check_integer(OP, "eval_prompts", self.eval_prompts, 1, 2**31)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"{OP}: min_new_tokens: expected at most {self.max_new_tokens}; got {self.min_new_tokens}")
        self.temperature = check_number(OP, "temperature", self.temperature, 0.0, open_low=True)
        self.eval_temperature = check_number(OP, "eval_temperature", self.eval_temperature, 0.0)
        self.top_p = check_number(OP, "top_p", self.top_p, 0.0, 1.0, open_low=True)
        self.missing_eos_penalty = check_number(OP, "missing_eos_penalty", self.missing_eos_penalty, 0.0)
        self.ema_decay = check_number(OP, "ema_decay", self.ema_decay, 0.0, 1.0)
        self.anchor_weight = check_number(OP, "anchor_weight", self.anchor_weight, 0.0)

        if self.kl == "exact" and self.algorithm_spec.opponent == "snapshot":
            raise ValueError(f"{OP}: kl: {self.algorithm} has two references and needs to_go or sequence; got 'exact'")

    def _check_inherited(self) -> None:
        """Check TrainingArguments' numbers: infinity and NaN would make the weights not finite, hours later."""
        for name, (low, open_low) in _NUMBERS.items():
            if (value := getattr(self, name)) is not None:
                check_number(OP, name, value, low, open_low=open_low)
        for name in ("adam_beta1", "adam_beta2"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{OP}: {name}: expected a number below 1; got {getattr(self, name)}")
        for name, lowest in _COUNTS.items():
            if (value := getattr(self, name)) is not None:
                check_integer(OP, name, value, lowest, 2**31 - 1)
        for entry in fields(self):  # what is nested, as in lr_scheduler_kwargs, or added by another version
            if (wrong := _not_finite(getattr(self, entry.name))) is not None:
                raise ValueError(f"{OP}: {entry.name}: expected finite numbers; got {wrong}")

    def _check_unused(self) -> None:
        """Refuse changed options that the algorithm does not read."""
        algorithm, unused = self.algorithm_spec, []
        if algorithm.beta is not None:
            unused.append("beta")
        if algorithm.trains_pairs:
            unused += ["kl", "baseline"]
        if algorithm.opponent != "average":
            unused.append("ema_decay")
        if algorithm.opponent != "snapshot":
            unused += ["refresh_steps", "anchor_weight"]
        usual = defaults()
        for name in unused:
            if getattr(self, name) != usual[name]:
                raise ValueError(f"{OP}: {name}: {self.algorithm} does not use it; got {getattr(self, name)!r}")

    def _check_fixed(self) -> None:
        for name, default in defaults().items():
            value = getattr(self, name)
            if name in FIXED and _unset(value) != _unset(default):
                raise ValueError(f"{OP}: {name}: expected {default!r}, as {FIXED[name]}; got {value!r}")
        check_option(OP, "train_sampling_strategy", str(self.train_sampling_strategy), SAMPLING)
        if self.do_eval and str(getattr(self.eval_strategy, "value", self.eval_strategy)) == "no":
            raise ValueError(f"{OP}: do_eval: expected an eval_strategy beside it; got none")
        if any(kind in str(self.optim) for kind in ("lomo", "layerwise")):
            raise ValueError(
                f"{OP}: optim: expected an optimizer that steps after the backward pass, as gradients are looked at "
                f"before they are applied; got {self.optim!r}"
            )

    def _check_batches(self) -> None:
        """Refuse accelerate's options that would change which prompts a process gets."""
        split: Any = self.accelerator_config
        for name, needed in {"split_batches": False, "dispatch_batches": None, "even_batches": True}.items():
            value = getattr(split, name)
            if (value or None) != (needed or None):
                raise ValueError(
                    f"{OP}: accelerator_config: {name}: expected {needed}, so that every process has "
                    f"per_device_train_batch_size prompts of every batch; got {value!r}"
                )
        if "num_steps" in (split.gradient_accumulation_kwargs or {}):
            raise ValueError(f"{OP}: accelerator_config: expected gradient_accumulation_steps instead of num_steps")

    def to_dict(self) -> dict[str, Any]:
        """Return all options for logs; a schedule that is a function is replaced by its name."""
        values: dict[str, Any] = super().to_dict()  # type: ignore[no-untyped-call]
        for name in ("beta", "tau"):
            if callable(values[name]):
                values[name] = f"{values[name].__module__}.{values[name].__qualname__}"
        return values


def _not_finite(value: Any) -> float | None:
    if isinstance(value, float):
        return None if math.isfinite(value) else value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return next((wrong for part in parts if (wrong := _not_finite(part)) is not None), None)


def _unset(value: Any) -> Any:
    """Return None for all values that mean no: transformers' command line turns a default "no" into False."""
    return None if not value or value == "no" else value


def defaults() -> dict[str, Any]:
    """Return the default of every field."""
    return {
        entry.name: entry.default_factory() if callable(entry.default_factory) else entry.default
        for entry in fields(NashConfig)
    }


def own_fields(kind: type[TrainingArguments] | None = None) -> list[Any]:
    """Return the fields that NashConfig, or another subclass of TrainingArguments, adds."""
    inherited = {entry.name for entry in fields(TrainingArguments)}
    return [entry for entry in fields(kind or NashConfig) if entry.name not in inherited]


def document_fields(kind: type[TrainingArguments]) -> None:
    """Append an Args block of the fields that `kind` adds, from their help texts, to its docstring."""
    lines = []
    for entry in own_fields(kind):
        lines += textwrap.wrap(f"{entry.name}: {entry.metadata['help']}.", 108, subsequent_indent="    ")
    block = "\n".join(f"        {line}" for line in lines)
    kind.__doc__ = f"{(kind.__doc__ or '').rstrip()}\n\n    Args:\n{block}\n    "


document_fields(NashConfig)
