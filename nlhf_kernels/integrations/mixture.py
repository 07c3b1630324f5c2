"""generate_mixture: responses from the mixture of two models, with the option names of transformers' generate().

The rollout engine (nlhf_kernels/engine) decodes; this module translates arguments and results. A model without a
key/value cache reads the whole text every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..engine import Hooks, Player, RolloutEngine, RolloutSettings, has_key_value_cache
from ..engine.hooks import Criterion, Processor

_OP = "generate_mixture"
Beta = float | torch.Tensor


@dataclass(frozen=True)
class MixtureGeneration:
    """The result of `generate_mixture`: B rows, prompts of S tokens, T new tokens.

    Args:
        sequences ((B, S + T) int64): prompts and new tokens; the pad id after a row's end.
        mask ((B, T) bool): True at a row's new tokens, its end-of-sequence token included.
        policy_logprobs ((B, T) float32): of the new tokens, at temperature 1, unfiltered; 0 where mask is False.
        reference_logprobs ((B, T) float32): likewise; None without a reference.
        mixture_logprobs ((B, T) float32): under the distribution that was sampled: after temperature and filters.
        ok ((B,) bool): False where at some step the logits were no distribution (a NaN); the token there is 0.
        seed (int): reproduces the rows.
    """

    sequences: torch.Tensor
    mask: torch.Tensor
    policy_logprobs: torch.Tensor | None
    reference_logprobs: torch.Tensor | None
    mixture_logprobs: torch.Tensor | None
    ok: torch.Tensor
    seed: int

    @property
    def tokens(self) -> torch.Tensor:
        """The new tokens, (B, T)."""
        return self.sequences[:, self.sequences.shape[1] - self.mask.shape[1] :]


def generate_mixture(
    policy: torch.nn.Module,
    reference: torch.nn.Module | None,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    max_new_tokens: int,
    beta: Beta | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | None = None,
    row_ids: torch.Tensor | None = None,
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

    The noise of a row is a function of (seed, its row id, the new token's index, stream), independent of the batch.
    Dropout is off during decoding; the models' training flags are restored.

    Args:
        policy: a causal language model of transformers, or a peft model around one.
        reference: likewise; None: the base of a policy with adapters, else the policy decodes alone.
        input_ids ((B, S) int64): prompts, padded on the left.
        attention_mask ((B, S) integers or bool): 0 at padding; None: nothing is padded.
        max_new_tokens (int): new tokens of a row, at most.
        beta (number, (B,) or one per returned row): the reference's weight; needed with a reference.
        temperature, top_k, top_p, min_p: as in `mixture_sample`; temperature 0 is greedy.
        seed (int): None draws one from torch's default generator.
        row_ids ((B,) or one per returned row, int64): ids that the noise depends on; None numbers the returned rows;
            of (B,) ids, returned sequence j of a prompt takes `row_id * num_return_sequences + j`.
        stream (int): stream of the noise; see `mixture_sample`.
        num_return_sequences (int): returned rows per prompt.
        eos_token_id (int, sequence or tensor of ints): None: the policy's own; (): none.
        pad_token_id (int): None: the first of the end-of-sequence ids.
        min_new_tokens (int): new tokens before which no end of sequence is sampled.
        vocab_size (int): columns of the heads that count; None: all, which must then be equally many.
        logits_processor: callables on (ids, scores); they see the mixture's logits, before temperature and filters.
        stopping_criteria: callables on (ids, None); True ends a row.
        streamer: an object with `put(tokens)` and `end()`.
        use_cache (bool): False reads the whole text every step.
        logprobs (sequence of "policy", "reference", "mixture"): what is computed and returned; None: all there are.
        backend (str): backend of the sampler; None: chosen by `use_backend`, or automatically.
    """
    models = [policy] if reference is None else [policy, reference]
    cached = use_cache and all(has_key_value_cache(model) for model in models)
    engine = RolloutEngine(policy, reference, vocab_size=vocab_size, use_cache=cached, op=_OP)
    if (beta is None) is engine.has_reference:
        raise ValueError(f"{_OP}: beta: expected with a reference and not without; got {beta!r}")
    player = Player(0.0 if beta is None else beta, stream, num_return_sequences, row_ids)
    settings = RolloutSettings(
        max_new_tokens, min_new_tokens, temperature, top_k, top_p, min_p, seed,
        end_ids=eos_token_id, pad_id=pad_token_id, logprobs=logprobs, backend=backend,
    )  # fmt: skip
    hooks = Hooks(logits_processor, stopping_criteria, streamer)
    result = engine.rollout(input_ids, attention_mask, (player,), settings, hooks)
    if pad_token_id is None and not result.end_ids and not result[0].mask.all():
        raise ValueError(f"{_OP}: pad_token_id: expected an id, as a row ended before the others; got None")
    (responses,) = result
    return MixtureGeneration(
        sequences=torch.cat([input_ids.repeat_interleave(num_return_sequences, 0), responses.tokens], 1),
        mask=responses.mask,
        policy_logprobs=responses.policy_logprobs,
        reference_logprobs=responses.reference_logprobs,
        mixture_logprobs=responses.mixture_logprobs,
        ok=responses.ok,
        seed=result.seed,
    )
