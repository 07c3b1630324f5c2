"""Answers of saved policies to prompts, through the rollout engine; with a reference, how far they are from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..core.checks import check_integer, check_number
from ..core.loading import load_tokenizer
from ..core.rng import Stream
from ..data import prompt_batch
from ..engine import Finish, Player, Responses, RolloutEngine, RolloutSettings


@dataclass(frozen=True)
class Sampling:
    answer_tokens: int  # at most
    prompt_tokens: int  # of longer prompts the last ones are kept
    samples: int = 1  # answers to every prompt
    temperature: float = 1.0
    seed: int = 0
    batch: int = 64  # prompts at once: memory and speed, not results

    def __post_init__(self) -> None:
        for name, low in {"answer_tokens": 1, "prompt_tokens": 2, "samples": 1, "seed": 0, "batch": 1}.items():
            check_integer("answers", name, getattr(self, name), low, 2**31 - 1)
        check_number("answers", "temperature", self.temperature, 0.0)


@dataclass(frozen=True)
class Answers:
    """P prompts, K answers to each."""

    texts: list[list[str]]
    lengths: torch.Tensor  # (P, K) tokens, the end token included
    ended: torch.Tensor  # (P, K) bool
    kl: torch.Tensor | None  # (P, K) log policy / reference of the whole answer; None without a reference

    def column(self, sample: int) -> list[str]:
        return [row[sample] for row in self.texts]


def load_answering(place: str, name: str, **options: Any) -> Any:
    """A tokenizer with an end token and one for padding: the end token serves where there is none, as padding is
    masked."""
    tokenizer = load_tokenizer(place, name, **options)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{place}: expected a tokenizer with an end token; got one without, {name!r}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_ids(tokenizer: Any, model: Any) -> tuple[int, ...]:
    """The tokenizer's and the model's."""
    known = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [known] if isinstance(known, int) else list(known or ())
    return tuple(dict.fromkeys([*ends, tokenizer.eos_token_id]))


def answer(
    policy: Any,
    reference: Any,  # None: there is none, or the policy's own base where it has adapters
    tokenizer: Any,
    prompts: Sequence[str],
    sampling: Sampling,
    advance: Callable[[int], None] = lambda done: None,
) -> Answers:
    """An answer depends on policy, prompt, its number and the seed, not on the batch."""
    engine = RolloutEngine(policy, reference, vocab_size=None, op="answers")
    settings = RolloutSettings(
        max_new_tokens=sampling.answer_tokens,
        temperature=sampling.temperature,
        seed=sampling.seed,
        end_ids=end_ids(tokenizer, policy),
        pad_id=tokenizer.pad_token_id,
        logprobs=("policy", "reference") if engine.mixes else (),
    )
    parts = []
    for start in range(0, len(prompts), sampling.batch):
        chosen = list(prompts[start : start + sampling.batch])
        batch = prompt_batch(tokenizer, chosen, sampling.prompt_tokens, engine.device)
        ids = torch.arange(start, start + len(chosen), dtype=torch.int64, device=engine.device)
        player = Player(0.0, Stream.USER, sampling.samples, ids)
        (responses,) = engine.rollout(batch["input_ids"], batch["attention_mask"], [player], settings)
        responses.check_finite("answers")
        parts.append(_read(responses, tokenizer, sampling.samples))
        advance(start + len(chosen))
    kl = [part.kl for part in parts if part.kl is not None]
    return Answers(
        [row for part in parts for row in part.texts],
        torch.cat([part.lengths for part in parts]),
        torch.cat([part.ended for part in parts]),
        torch.cat(kl) if kl else None,
    )


def _read(responses: Responses, tokenizer: Any, samples: int) -> Answers:
    rows = [row[:n] for row, n in zip(responses.tokens.tolist(), responses.lengths.tolist(), strict=True)]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    kl = None
    if responses.policy_logprobs is not None and responses.reference_logprobs is not None:
        ratio = (responses.policy_logprobs - responses.reference_logprobs) * responses.mask
        kl = ratio.sum(1).view(-1, samples).cpu()
    return Answers(
        [texts[start : start + samples] for start in range(0, len(texts), samples)],
        responses.lengths.view(-1, samples).cpu(),
        (responses.finish == Finish.END).view(-1, samples).cpu(),
        kl,
    )
