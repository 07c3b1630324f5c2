"""Answers of policies to prompts, sampled by the rollout engine, and with a reference their KL from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..core.checks import check_integer, check_number
from ..core.rng import Stream
from ..core.tokens import end_token_ids
from ..data import prompt_batch
from ..engine import Finish, Player, Responses, RolloutEngine, RolloutSettings


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled.

    Args:
        answer_tokens (int): tokens of an answer, at most.
        prompt_tokens (int): tokens of a prompt, at most; longer ones are truncated on the left.
        samples (int): answers to each prompt, K.
        temperature (float): of the policy; 0 takes the likeliest token.
        seed (int): of the noise. Policies sampled with one seed share it: answer k to a prompt uses the same uniforms.
        batch (int): prompts in one batch. It changes memory and speed, not the answers.
    """

    answer_tokens: int
    prompt_tokens: int
    samples: int = 1
    temperature: float = 1.0
    seed: int = 0
    batch: int = 64

    def __post_init__(self) -> None:
        for name, low in {"answer_tokens": 1, "prompt_tokens": 2, "samples": 1, "seed": 0, "batch": 1}.items():
            check_integer("answers", name, getattr(self, name), low, 2**31 - 1)
        check_number("answers", "temperature", self.temperature, 0.0)


@dataclass(frozen=True)
class Answers:
    """K answers of one policy to each of P prompts.

    Args:
        texts (list of P lists of K texts): the answers.
        lengths (tensor (P, K), int64): tokens of each, the end token included.
        ended (tensor (P, K), bool): whether the policy ended the answer itself.
        kl (tensor (P, K) or None): log policy - log reference of the whole answer; its mean estimates the KL
            divergence in nats per answer. None without a reference.
        seed (int or None): of the noise; answers of policies with one seed are not independent. None: noise that no
            other answers share.
    """

    texts: list[list[str]]
    lengths: torch.Tensor
    ended: torch.Tensor
    kl: torch.Tensor | None
    seed: int | None = None


def sample_answers(
    policy: Any,
    reference: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    sampling: Sampling,
    advance: Callable[[int], None] = lambda done: None,
) -> Answers:
    """Sample answers to every prompt. An answer depends on policy, prompt index, its number and the seed, not on the
    batch.

    Args:
        policy (causal language model): in evaluation mode, on its device.
        reference (causal language model or None): what `Answers.kl` is measured from. None: the base of a policy with
            adapters; no KL for a policy without.
        tokenizer (transformers tokenizer): with an end and a padding token (`core.loading.load_generation_tokenizer`).
        prompts (sequence of P texts): the prompts.
        sampling (Sampling): lengths, number of answers, temperature, seed.
        advance (callable): called with the number of prompts answered so far.
    """
    engine = RolloutEngine(policy, reference, vocab_size=None, op="answers")
    settings = RolloutSettings(
        max_new_tokens=sampling.answer_tokens,
        temperature=sampling.temperature,
        seed=sampling.seed,
        end_ids=end_token_ids(policy, tokenizer),
        pad_id=tokenizer.pad_token_id,
        logprobs=("policy", "reference") if engine.has_reference else (),
    )
    samples = sampling.samples
    texts: list[str] = []
    lengths, ended, kl = [], [], []
    for start in range(0, len(prompts), sampling.batch):
        batch_prompts = list(prompts[start : start + sampling.batch])
        batch = prompt_batch(tokenizer, batch_prompts, sampling.prompt_tokens, engine.device)
        ids = torch.arange(start, start + len(batch_prompts), dtype=torch.int64, device=engine.device)
        player = Player(0.0, Stream.USER, samples, ids)
        (responses,) = engine.rollout(batch["input_ids"], batch["attention_mask"], [player], settings)
        responses.check_finite("answers")
        texts += response_texts(tokenizer, responses)
        lengths.append(responses.lengths.view(-1, samples).cpu())
        ended.append((responses.finish == Finish.END).view(-1, samples).cpu())
        if engine.has_reference:
            kl.append(response_kl(responses).view(-1, samples).cpu())
        advance(start + len(batch_prompts))
    rows = [texts[start : start + samples] for start in range(0, len(texts), samples)]
    return Answers(rows, torch.cat(lengths), torch.cat(ended), torch.cat(kl) if kl else None, sampling.seed)


def kl_values(runs: Sequence[Answers]) -> torch.Tensor:
    """Estimate the KL from the reference at each prompt, (S, P) float64, in nats per answer.

    Args:
        runs (sequence of S Answers): of one policy's training runs, sampled with a reference.
    """
    values = [answers.kl.double().mean(1) for answers in runs if answers.kl is not None]
    if not values or len(values) < len(runs):
        raise ValueError("answers: runs: expected answers sampled with a reference; got some without a KL from it")
    return torch.stack(values)


def answer_measures(runs: Sequence[Answers]) -> dict[str, float]:
    """Return means over runs, prompts and answers: `length`, `end_rate` and, with a reference, `kl` and `kl_error`,
    its standard error over prompts.

    Args:
        runs (sequence of S Answers): of one policy's training runs.
    """
    measures = {
        "length": float(torch.stack([answers.lengths for answers in runs]).double().mean()),
        "end_rate": float(torch.stack([answers.ended for answers in runs]).double().mean()),
    }
    if all(answers.kl is not None for answers in runs):
        by_prompt = kl_values(runs).mean(0)
        measures |= {"kl": float(by_prompt.mean()), "kl_error": float(by_prompt.std() / len(by_prompt) ** 0.5)}
    return measures


def response_texts(tokenizer: Any, responses: Responses) -> list[str]:
    """Decode one player's responses, without special tokens.

    Args:
        tokenizer (transformers tokenizer): the policy's.
        responses (Responses): of R rows.
    """
    tokens, lengths = responses.tokens.tolist(), responses.lengths.tolist()
    rows = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
    texts: list[str] = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return texts


def response_kl(responses: Responses) -> torch.Tensor:  # (R,)
    """Sum log policy - log reference over the tokens of each response; the mean estimates the KL divergence.

    Args:
        responses (Responses): sampled from the policy with both log-probabilities.
    """
    if responses.policy_logprobs is None or responses.reference_logprobs is None:
        raise ValueError("answers: responses: expected log-probabilities of policy and reference; got none")
    return ((responses.policy_logprobs - responses.reference_logprobs) * responses.mask).sum(1)
