"""generate_mixture: one response per row from the mixture of two models, with transformers' vocabulary of options.

The decoding is the rollout engine's (nlhf_kernels/engine); here its arguments and results take the shape that
`generate()` callers know. A model without a key/value cache reads the whole text every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..engine import Hooks, Player, RolloutEngine, RolloutResult, RolloutSettings, has_key_value_cache
from ..engine.hooks import Criterion, Processor

_OP = "generate_mixture"
Beta = float | torch.Tensor


@dataclass(frozen=True)
class MixtureGeneration:
    """What `generate_mixture` drew. B rows, prompts of S tokens, T new tokens."""

    sequences: torch.Tensor  # (B, S + T) int64; the pad id after a row's end
    mask: torch.Tensor  # (B, T) bool: tokens the row generated, its end-of-sequence token included
    policy_logprobs: torch.Tensor | None  # (B, T) float32, at temperature 1, unfiltered; 0 where mask is False
    reference_logprobs: torch.Tensor | None  # likewise; None without a reference
    mixture_logprobs: torch.Tensor | None  # (B, T) float32, of what was drawn from: after temperature and filters
    ok: torch.Tensor  # (B,) bool; False: at some step the logits were no distribution (NaN), the token there is 0
    seed: int  # gives the same rows again

    @property
    def tokens(self) -> torch.Tensor:  # (B, T)
        return self.sequences[:, self.sequences.shape[1] - self.mask.shape[1] :]


def generate_mixture(
    policy: torch.nn.Module,
    reference: torch.nn.Module | None,  # None: the base of a policy with adapters, else the policy alone
    input_ids: torch.Tensor,  # (B, S) int64, padded on the left
    attention_mask: torch.Tensor | None = None,  # (B, S), 0 at padding; None: there is none
    *,
    max_new_tokens: int,
    beta: Beta | None = None,  # number, (B,) or one per returned row; needed with a reference
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | None = None,
    row_ids: torch.Tensor | None = None,  # (B,) or one per returned row, int64
    stream: int = 0,
    num_return_sequences: int = 1,
    eos_token_id: int | Sequence[int] | torch.Tensor | None = None,
    pad_token_id: int | None = None,
    min_new_tokens: int = 0,
    vocab_size: int | None = None,
    logits_processor: Sequence[Processor] = (),
    stopping_criteria: Sequence[Criterion] = (),
    streamer: Any = None,
    use_cache: bool = True,
    logprobs: Sequence[str] | None = None,
    backend: str | None = None,
) -> MixtureGeneration:
    """Decode with both models, token by token, from softmax(((1 - beta) z_policy + beta z_reference) / temperature).

    temperature, top_k, top_p, min_p, vocab_size, stream and backend are those of `mixture_sample`; temperature 0 is
    greedy. The noise of a row is a function of (seed, its row id, the new token's index, stream): not of the batch.
    seed None draws one from torch's default generator. row_ids None counts the returned rows; (B,) ids give returned
    sequence j of a prompt the id `row_id * num_return_sequences + j`.

    eos_token_id None means the policy's own, () none; pad_token_id None means the first of them. Processors see the
    mixture's raw logits, before temperature and filters. logprobs names what is kept, of policy, reference, mixture.
    Dropout is off meanwhile; the models' training flags come back as they were.
    """
    engine = _engine(policy, reference, vocab_size, use_cache)
    if (beta is None) is engine.mixes:
        raise ValueError(f"{_OP}: beta: expected with a reference and not without; got {beta!r}")
    player = Player(0.0 if beta is None else beta, stream, num_return_sequences, row_ids)
    settings = RolloutSettings(
        max_new_tokens, min_new_tokens, temperature, top_k, top_p, min_p, seed,
        end_ids=eos_token_id, pad_id=pad_token_id, logprobs=logprobs, backend=backend,
    )  # fmt: skip
    hooks = Hooks(logits_processor, stopping_criteria, streamer)
    result = engine.rollout(input_ids, attention_mask, (player,), settings, hooks)
    if pad_token_id is None and not result.ends and not result[0].mask.all():
        raise ValueError(f"{_OP}: pad_token_id: expected an id, as a row ended before the others; got None")
    return _generation(input_ids.repeat_interleave(num_return_sequences, 0), result)


def _engine(policy: Any, reference: Any, vocab_size: int | None, use_cache: bool) -> RolloutEngine:
    models = [policy] if reference is None else [policy, reference]
    cached = use_cache and all(has_key_value_cache(model) for model in models)
    return RolloutEngine(policy, reference, vocab_size=vocab_size, use_cache=cached, op=_OP)


def _generation(prompts: torch.Tensor, result: RolloutResult) -> MixtureGeneration:
    drawn = result[0]
    return MixtureGeneration(
        sequences=torch.cat([prompts, drawn.tokens], 1),
        mask=drawn.mask,
        policy_logprobs=drawn.policy_logprobs,
        reference_logprobs=drawn.reference_logprobs,
        mixture_logprobs=drawn.mixture_logprobs,
        ok=drawn.ok,
        seed=result.seed,
    )
