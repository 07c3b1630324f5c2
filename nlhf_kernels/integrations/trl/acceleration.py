"""`accelerate_trl()`: an installed TRL's own NashMDTrainer with these rollouts and losses.

These methods of the class are replaced: `_generate_completions` (one pass of the rollout engine for both answers),
`_compute_logprobs` and `_compute_losses` (the fused loss on hidden states; the reference's log-probabilities are the
rollout's), `beta` and `mixture_coef` (lists by epoch), `training_step` (around the old one: losses of micro-batches
are averaged). Rewards, logs, data and evaluation stay TRL's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch

from ...core import upstream
from ...core.checks import check_option
from ...engine import Responses, RolloutEngine, RolloutSettings, nash_md
from ...ops import linear_nash_pg_loss
from ...ops.logprobs.layout import IGNORED
from ...train.heads import check_head, head_of, hidden_states
from ...train.opponents import RolloutPolicy
from ...train.schedules import value_at

OP = "accelerate_trl"
KL_MODES = ("to_go", "sequence", "token")
MARK = "_nlhf_acceleration"  # on the class that has been changed
_PLAIN = {"do_sample", "pad_token_id", "bos_token_id", "eos_token_id", "repetition_penalty", "use_cache"}
_SAMPLING = {"max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "min_p"}


def accelerate_trl(*, kl: str = "to_go", backend: str | None = None) -> Acceleration:
    """Give the installed TRL's NashMDTrainer these rollouts and losses, until `undo()` or the end of a `with` block.

    A second call changes nothing, and its `with` block ends without undoing the first.

    Args:
        kl: "to_go" or "sequence", both unbiased; "token" is TRL's own estimate, biased where answers have several
            tokens.
        backend: of the kernels; None: the fastest that can run.
    """
    check_option(OP, "kl", kl, KL_MODES)
    trainer = upstream.trl_trainer_class(OP)
    acceleration: Acceleration | None = vars(trainer).get(MARK)
    if acceleration is None:
        upstream.check_trl_methods(OP, trainer)
        return Acceleration(trainer, kl, backend)
    for name, value in {"kl": kl, "backend": backend}.items():
        if value != getattr(acceleration, name):
            raise ValueError(
                f"{OP}: {name}: expected {getattr(acceleration, name)!r}, as TRL's trainer is accelerated already "
                f"(undo() that first); got {value!r}"
            )
    acceleration.calls += 1
    return acceleration


class Acceleration:
    """The changes of `accelerate_trl`. `undo()` reverts them; so does leaving the first call's `with` block.

    Args:
        trainer: TRL's class.
        kl, backend: as for `accelerate_trl`.
    """

    def __init__(self, trainer: Any, kl: str, backend: str | None) -> None:
        self.kl, self.backend, self.trainer = kl, backend, trainer
        self.calls = 1  # of accelerate_trl, less those whose `with` blocks have ended
        self.rollouts: WeakKeyDictionary[Any, Rollouts] = WeakKeyDictionary()
        changed = self._methods(trainer.training_step) | {MARK: self}
        self._before = {name: vars(trainer).get(name) for name in changed}
        for name, value in changed.items():
            setattr(trainer, name, value)

    def undo(self) -> None:
        """Restore the class's own methods; a second call changes nothing."""
        for name, value in self._before.items():
            if value is None:
                delattr(self.trainer, name)
            else:
                setattr(self.trainer, name, value)
        self._before = {}
        self.rollouts.clear()

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, *_: object) -> None:
        self.calls -= 1
        if self.calls == 0:
            self.undo()

    def _of(self, trainer: Any) -> Rollouts:
        if trainer not in self.rollouts:
            self.rollouts[trainer] = Rollouts(trainer, self.kl, self.backend)
        return self.rollouts[trainer]

    def _methods(self, step: Any) -> dict[str, Any]:
        def generate(trainer: Any, model: Any, prompts: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return self._of(trainer).generate(prompts)

        def logprobs(trainer: Any, model: Any, data: Any, context: int) -> tuple[torch.Tensor, torch.Tensor]:
            return self._of(trainer).logprobs(model)

        def losses(trainer: Any, policy: Any, reference: Any, probability: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self._of(trainer).loss(probability)

        def training_step(trainer: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            with upstream.finite_attention_gradients():
                loss: torch.Tensor = step(trainer, model, inputs, num_items_in_batch)
            # TRL divides the reported loss by the number of micro-batches; this loss is divided already
            reported: torch.Tensor = loss * trainer.args.gradient_accumulation_steps
            return reported

        return {
            "_generate_completions": generate,
            "_compute_logprobs": logprobs,
            "_compute_losses": losses,
            "training_step": training_step,
            "beta": property(lambda trainer: _now(trainer, "beta")),
            "mixture_coef": property(lambda trainer: _now(trainer, "mixture_coef")),
        }


def _now(trainer: Any, name: str) -> float:
    state = trainer.state
    return value_at(name, upstream.trl_schedule(trainer, name), state.global_step, state.epoch or 0.0)


@dataclass
class Step:
    """The state of a micro-batch between its rollout and its loss."""

    input_ids: torch.Tensor  # (B, S + T)
    attention_mask: torch.Tensor  # (B, S + T)
    answer: Responses  # y
    hidden: torch.Tensor | None = None  # (B, T, D)


class Rollouts:
    """One trainer's engine, and its current micro-batch."""

    def __init__(self, trainer: Any, kl: str, backend: str | None) -> None:
        _check(trainer)
        self.kl, self.backend = kl, backend
        self.trainer = ref(trainer)  # weak: the trainer owns this object
        self.settings = _settings(trainer, backend)
        dtype = torch.bfloat16 if trainer.args.bf16 else None
        with _bare(trainer.model):
            check_head(trainer.model, "model")
            self.rollout_policy = RolloutPolicy(trainer.model, dtype)
        self.reference = None
        if trainer.ref_model is not None:
            with _bare(trainer.ref_model):
                self.reference = RolloutPolicy(trainer.ref_model, self.rollout_policy.dtype).model
        self.engine = RolloutEngine(self.rollout_policy.model, self.reference, op=OP)

    def _trainer(self) -> Any:
        return self.trainer()

    def generate(self, prompts: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if self.rollout_policy.refresh():
            self.engine.release()
        ids, mask = prompts["input_ids"], prompts["attention_mask"]
        y, y_prime = self.engine.rollout(ids, mask, nash_md(self._trainer().mixture_coef), self.settings)
        if not (bool(y.ok.all()) and bool(y_prime.ok.all())):
            raise FloatingPointError(f"{OP}: expected finite logits; got NaN or infinity while sampling")
        self.step = Step(torch.cat([ids, y.tokens], 1), torch.cat([mask, y.mask.to(mask)], 1), y)
        return self.step.input_ids, torch.cat([ids, y_prime.tokens], 1)

    def logprobs(self, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rollout's log-probabilities: the policy has not changed. Compute the loss's hidden states."""
        answer = self.step.answer
        hidden = hidden_states(model, self.step.input_ids[:, :-1], self.step.attention_mask[:, :-1])
        self.step.hidden = hidden[:, -answer.tokens.shape[1] :].contiguous()
        assert answer.policy_logprobs is not None and answer.reference_logprobs is not None
        return answer.policy_logprobs, answer.reference_logprobs

    def loss(self, probability: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the loss, and what TRL logs: the score and log(pi / mu) of every row."""
        trainer, answer = self._trainer(), self.step.answer
        hidden, self.step.hidden = self.step.hidden, None
        assert hidden is not None
        with trainer.accelerator.autocast():
            result = linear_nash_pg_loss(
                hidden,
                head_of(trainer.model),
                answer.tokens.masked_fill(~answer.mask, IGNORED),
                probability.float(),
                tau=trainer.beta,
                kl=self.kl,
                reference_logprobs=answer.reference_logprobs,
                normalizer=len(hidden) * trainer.current_gradient_accumulation_steps,
                backend=self.backend,
            )
        policy, reference = result.policy_logprobs, result.reference_logprobs
        return result.loss, (probability - 0.5) * policy.sum(1), (policy - reference).sum(1)


def _check(trainer: Any) -> None:
    """Refuse options of TRL's trainer that are not supported here."""
    args = trainer.args
    unsupported = {
        "use_vllm": args.use_vllm,
        "fp16": args.fp16,
        "torch_compile": args.torch_compile,
        "use_liger_kernel": args.use_liger_kernel,
        "use_transformers_paged": getattr(args, "use_transformers_paged", False),
        "cache_implementation": args.cache_implementation is not None,
    }
    for name, is_set in unsupported.items():
        if is_set:
            raise ValueError(f"{OP}: {name}: expected its default; got {getattr(args, name)!r}")
    count = max(trainer.accelerator.num_processes, args.n_gpu)
    if count > 1 or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(
            f"{OP}: expected one process with one device and the whole model; got {count} (NashTrainer takes several)"
        )
    rates = [
        (name, key, value)
        for name, module in trainer.model.named_modules()
        for key, value in {**vars(module), "p": getattr(module, "p", 0.0)}.items()
        if (isinstance(module, torch.nn.Dropout) and key == "p") or "dropout" in key
        if isinstance(value, float) and value
    ]
    if rates:
        name, key, value = rates[0]
        raise ValueError(
            f"{OP}: model: expected no dropout, as answers are scored by the distribution they were drawn from; got "
            f"{name}.{key} = {value}"
        )


def _settings(trainer: Any, backend: str | None) -> RolloutSettings:
    options = trainer.generation_kwargs
    for name in options:
        if name not in _PLAIN | _SAMPLING:
            raise ValueError(f"{OP}: generation_kwargs: expected {', '.join(sorted(_SAMPLING))}; got {name!r}")
    if not options.get("do_sample", True) or options.get("repetition_penalty", 1.0) != 1.0:
        name = "repetition_penalty" if options.get("do_sample", True) else "do_sample"
        raise ValueError(f"{OP}: {name}: expected plain sampling; got {options[name]!r}")
    return RolloutSettings(
        **{name: options[name] for name in _SAMPLING if name in options},
        end_ids=options.get("eos_token_id", ()),
        pad_id=options["pad_token_id"],
        logprobs=("policy", "reference"),
        backend=backend,
    )


@contextmanager
def _bare(model: Any) -> Iterator[None]:
    """Remove accelerate's wrapper of the model's forward: a copy of the wrapper would call the original model."""
    wrapper = {name: vars(model).pop(name) for name in upstream.WRAPPED_FORWARD if name in vars(model)}
    try:
        yield
    finally:
        vars(model).update(wrapper)
