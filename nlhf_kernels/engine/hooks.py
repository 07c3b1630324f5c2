"""Hooks of the decoding loop: logits processors, stopping criteria and a streamer, as in transformers' generate().

Hooks run on the host at every token, so a rollout with hooks checks for ends after every step and never compacts its
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # token ids (B, L), scores (B, V) -> scores
Criterion = Callable[[torch.Tensor, Any], "torch.Tensor | bool"]  # token ids (B, L), None -> (B,) bool


@dataclass(frozen=True)
class Hooks:
    """Callables that a rollout of one player runs at every token.

    Args:
        processors: logits processors, called with the token ids (B, L) and the mixture's raw logits (B, V) float32,
            before temperature and filters.
        criteria: stopping criteria, called with the token ids (B, L) and None; True ends a row, or all of them.
        streamer: an object with `put(tokens)`, called with every column of new tokens (B,), and `end()`.
    """

    processors: Sequence[Processor] = ()
    criteria: Sequence[Criterion] = ()
    streamer: Any = None

    def __bool__(self) -> bool:
        return bool(self.processors or self.criteria) or self.streamer is not None

    def process(self, text: torch.Tensor, logits: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
        """Mix the models' logits and apply the processors. Returns scores, (B, V) float32.

        Args:
            text ((B, L) int64): the tokens so far.
            logits (sequence of (B, V)): one per model.
            weights ((B, models) float32): of the mixture.
        """
        scores = torch.zeros_like(logits[0], dtype=torch.float32)
        for weight, model_logits in zip(weights.unbind(1), logits, strict=True):
            column = weight[:, None]
            scores = scores + torch.where(column == 0, 0.0, column * model_logits.float())  # 0 * -inf would be NaN
        for processor in self.processors:
            scores = processor(text, scores).float()
        return scores

    def should_stop(self, text: torch.Tensor) -> torch.Tensor:
        """Return which rows a criterion ends, (B,) bool.

        Args:
            text ((B, L) int64): the tokens so far.
        """
        stops = torch.zeros(len(text), dtype=torch.bool, device=text.device)
        for criterion in self.criteria:
            stops = stops | criterion(text, None)
        return stops
