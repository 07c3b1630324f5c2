"""What a caller may hang into the loop: logits processors, stopping criteria and a streamer, as transformers has them.

They look at every token, on the host, so a rollout with hooks checks every step and keeps every row in its place.
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
    processors: Sequence[Processor] = ()  # see the mixture's raw logits, before temperature and filters
    criteria: Sequence[Criterion] = ()
    streamer: Any = None  # put(tokens), end()

    def __bool__(self) -> bool:
        return bool(self.processors or self.criteria) or self.streamer is not None

    def scores(
        self, text: torch.Tensor, logits: Sequence[torch.Tensor], weights: torch.Tensor
    ) -> torch.Tensor:  # (B, L), of (B, V), (B, models) -> (B, V) float32
        """What the processors make of the mixture. A model of weight 0 is not touched: 0 * -inf is NaN."""
        mixed = torch.zeros_like(logits[0], dtype=torch.float32)
        for weight, model in zip(weights.unbind(1), logits, strict=True):
            column = weight[:, None]
            mixed = mixed + torch.where(column == 0, 0.0, column * model.float())
        for processor in self.processors:
            mixed = processor(text, mixed).float()
        return mixed

    def stopped(self, text: torch.Tensor) -> torch.Tensor:  # (B,) bool
        stops = torch.zeros(len(text), dtype=torch.bool, device=text.device)
        for criterion in self.criteria:
            stops = stops | criterion(text, None)
        return stops
