"""NashMDConfig: TRL 1.13's names and defaults, their translation to NashConfig, and the options that are refused."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from ...core.checks import check_integer, check_number
from ...train import NashConfig
from ...train.config import document_fields

OP = "NashMDConfig"
_VLLM = "both models decode in lockstep, in the rollout engine"
#: Options of TRL's that must keep their defaults, and why.
REFUSED = {
    "repetition_penalty": "answers are scored by the distribution they were drawn from",
    "cache_implementation": "the rollout engine keeps caches of its own, one for each model",
    "loss_type": "Nash-MD has one loss; NashConfig(algorithm='ipo-md') trains with IPO's",
    "disable_dropout": "answers are scored by the distribution they were drawn from",
    "use_vllm": _VLLM,
    "vllm_model_impl": _VLLM,
    "vllm_structured_outputs_regex": _VLLM,
    "vllm_gpu_memory_utilization": _VLLM,
    "vllm_mode": _VLLM,
    "vllm_server_base_url": _VLLM,
    "vllm_server_host": _VLLM,
    "vllm_server_port": _VLLM,
    "vllm_server_timeout": _VLLM,
    "vllm_group_port": _VLLM,
    "vllm_tensor_parallel_size": _VLLM,
    "vllm_enable_sleep_mode": _VLLM,
    "ds3_gather_for_generation": "rollouts need the whole model on every process",
}
#: What `generation_kwargs` may hold; it goes before the options of the same names.
GENERATION = ("max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "min_p")
_RENAMED = (  # transformers' old names of options, and the new ones where it has them
    ("gradient_checkpointing", "activation_checkpointing"),
    ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
)


def _help(text: str) -> dict[str, str]:
    return {"help": text}


def _refused(default: Any) -> Any:
    return field(default=default, metadata=_help("must keep its default"))


@dataclass
class NashMDConfig(TrainingArguments):
    """transformers' TrainingArguments, and TRL's options of Nash-MD; `nash_config` translates them."""

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]  # noqa: RUF012

    # TRL's defaults of transformers' options
    learning_rate: float = field(default=5e-7, metadata=_help("the initial learning rate"))
    logging_steps: float = field(default=10, metadata=_help("updates between two logs"))
    gradient_checkpointing: bool | None = field(
        default=True, metadata=_help("compute activations again in the backward pass instead of keeping them")
    )
    bf16: bool | None = field(default=None, metadata=_help("train in bfloat16; none: yes, unless fp16 is set"))  # type: ignore[assignment]
    remove_unused_columns: bool = field(
        default=False, metadata=_help("must stay false: prompts are not the model's inputs")
    )

    # lists where TRL has them, so that transformers' HfArgumentParser reads them; numbers will do
    mixture_coef: list[float] = field(
        default_factory=lambda: [0.5],
        metadata=_help("weight of the reference in the opponent's mixture: a number, or one for every epoch"),
    )
    beta: list[float] = field(
        default_factory=lambda: [0.1],
        metadata=_help("price of leaving the reference, per nat: a number, or one for every epoch"),
    )
    kl: str = field(
        default="to_go",
        metadata=_help("how that price is estimated: to_go, sequence, exact, or token, TRL's biased one"),
    )
    reward_model_path: str | None = field(
        default=None, metadata=_help("a reward model's folder or hub name, instead of reward_funcs")
    )
    reward_weights: list[float] | None = field(
        default=None, metadata=_help("weights of the rewards, or of the judges; none: 1 each")
    )
    missing_eos_penalty: float | None = field(
        default=None, metadata=_help("taken off the reward of an answer without an end; with a judge, off P(y > y')")
    )
    max_new_tokens: int = field(default=64, metadata=_help("tokens of an answer at most"))
    max_length: int = field(
        default=512, metadata=_help("tokens of prompt and answer; of longer prompts the last ones are kept")
    )
    temperature: float = field(default=0.9, metadata=_help("of sampling"))
    top_p: float = field(default=1.0, metadata=_help("sample from the likeliest tokens that hold this probability"))
    top_k: int = field(default=0, metadata=_help("sample from the k likeliest tokens; 0: all"))
    min_p: float | None = field(
        default=None, metadata=_help("sample from tokens with at least this share of the likeliest one's probability")
    )
    generation_kwargs: dict[str, Any] | None = field(
        default=None, metadata=_help("of " + ", ".join(GENERATION) + "; goes before the options of these names")
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata=_help("for from_pretrained, where the model is given by name")
    )
    trust_remote_code: bool = field(default=False, metadata=_help("run code that comes with a model"))

    repetition_penalty: float = _refused(1.0)
    cache_implementation: str | None = _refused(None)
    loss_type: str = _refused("sigmoid")
    disable_dropout: bool = _refused(True)
    use_vllm: bool = _refused(False)
    vllm_model_impl: str = _refused("vllm")
    vllm_structured_outputs_regex: str | None = _refused(None)
    vllm_gpu_memory_utilization: float | None = _refused(0.55)
    vllm_mode: str = _refused("colocate")
    vllm_server_base_url: str | None = _refused(None)
    vllm_server_host: str = _refused("0.0.0.0")
    vllm_server_port: int = _refused(8000)
    vllm_server_timeout: float = _refused(240.0)
    vllm_group_port: int = _refused(51216)
    vllm_tensor_parallel_size: int = _refused(1)
    vllm_enable_sleep_mode: bool = _refused(False)
    ds3_gather_for_generation: bool = _refused(True)

    def __post_init__(self) -> None:
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        for old, new in _RENAMED:
            if hasattr(self, new) and getattr(self, new) is None:
                setattr(self, new, getattr(self, old))
        self.check()
        arguments = {entry.name: getattr(self, entry.name) for entry in fields(TrainingArguments)}
        super().__post_init__()  # type: ignore[no-untyped-call]
        # transformers fills in and converts some fields; NashConfig gets the values passed here, unless set later
        self._passed = {name: (value, copy.deepcopy(getattr(self, name))) for name, value in arguments.items()}

    def check(self) -> None:
        """Check all options; called again before they are used, as attributes can be set."""
        for entry in fields(self):
            if entry.name in REFUSED and getattr(self, entry.name) != entry.default:
                raise ValueError(
                    f"{OP}: {entry.name}: expected {entry.default!r}, as {REFUSED[entry.name]}; "
                    f"got {getattr(self, entry.name)!r}"
                )
        self.mixture_coef = _by_epoch("mixture_coef", self.mixture_coef, 1.0)
        self.beta = _by_epoch("beta", self.beta, math.inf)
        if self.missing_eos_penalty is not None:
            check_number(OP, "missing_eos_penalty", self.missing_eos_penalty, 0.0)
        if not isinstance(self.generation_kwargs, (dict, type(None))):
            raise TypeError(f"{OP}: generation_kwargs: expected a dict; got {type(self.generation_kwargs).__name__}")
        for name in self.generation_kwargs or {}:
            if name not in GENERATION:
                raise ValueError(f"{OP}: generation_kwargs: expected keys of {', '.join(GENERATION)}; got {name!r}")
        longest = check_integer(OP, "max_new_tokens", self.sampling()["max_new_tokens"], 1, 2**24)
        if check_integer(OP, "max_length", self.max_length, 0, 2**31) < longest + 2:
            raise ValueError(
                f"{OP}: max_length: expected room for a prompt, {longest + 2} or more with max_new_tokens={longest}; "
                f"got {self.max_length}"
            )
        check_number(OP, "min_p", self.sampling()["min_p"], 0.0, 1.0)

    def sampling(self) -> dict[str, Any]:
        """Return the options of sampling, `generation_kwargs` before the options of the same names."""
        named = {name: getattr(self, name) for name in GENERATION if name != "min_new_tokens"}
        options = {"min_new_tokens": 0, **named, **(self.generation_kwargs or {})}
        return {**options, "min_p": options["min_p"] or 0.0, "top_k": options["top_k"] or 0}

    def init_options(self) -> dict[str, Any]:
        """Return the options of from_pretrained for the policy."""
        options = self.model_init_kwargs or {}
        if not isinstance(options, dict):
            raise TypeError(f"{OP}: model_init_kwargs: expected a dict, or one in JSON; got {options!r}")
        return {"trust_remote_code": self.trust_remote_code, **options}

    def nash_config(self, missing_eos_penalty: float) -> NashConfig:
        """Return the NashConfig of the same run.

        Args:
            missing_eos_penalty: taken off P(y > y') for an answer without an end token.
        """
        self.check()
        values = {}
        for name, (argument, initial) in self._passed.items():
            current = getattr(self, name)
            values[name] = argument if current == initial else current
        for old, new in _RENAMED:
            if new in values:
                value = values.pop(old)
                set_later = getattr(self, old) != self._passed[old][1]  # under its old name
                values[new] = value if set_later else values[new]
        if values.get("ddp_find_unused_parameters") is None:
            values.pop("ddp_find_unused_parameters", None)
        sampling = self.sampling()
        del sampling["min_p"]  # the trainer's
        return NashConfig(
            **values,
            **sampling,
            algorithm="nash-md",
            beta=self.mixture_coef,
            tau=self.beta,
            kl=self.kl,
            max_prompt_length=self.max_length - sampling["max_new_tokens"],
            missing_eos_penalty=missing_eos_penalty,
        )


def _by_epoch(name: str, value: Any, high: float) -> Any:
    """Return a number or a list of numbers, checked; a list of one becomes that number, as in TRL."""
    if isinstance(value, (list, tuple)):
        if not value:
            raise ValueError(f"{OP}: {name}: expected a number for every epoch; got an empty list")
        numbers = [check_number(OP, f"{name}[{epoch}]", number, 0.0, high) for epoch, number in enumerate(value)]
        return numbers[0] if len(numbers) == 1 else numbers
    return check_number(OP, name, value, 0.0, high)


document_fields(NashMDConfig)
