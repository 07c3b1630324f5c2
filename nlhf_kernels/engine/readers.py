"""One forward pass of one model over its rows: of prompts, once, then of a token a row, step after step.

A reader owns its cache. It says whose logits it gives (`names`): a model's own, or with shared weights the policy's
and the reference's at once (shared_weights.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from ..ops import decode_window
from .caches import StaticRowsCache
from .clock import Clock
from .models import ModelFacts
from .request import Prompts

OP = "rollout"
Span = tuple[int, int]  # of the rollout's rows


class Reader(Protocol):
    @property
    def names(self) -> tuple[str, ...]:
        """The models whose logits it gives."""

    def start(self, prompts: Prompts, fan_out: torch.Tensor, spans: Mapping[str, Span]) -> dict[str, torch.Tensor]:
        """Logits of the first new token, {name: (rows of its span, V)}. `fan_out` (rows,): each row's prompt."""

    def step(self, tokens: torch.Tensor, clock: Clock) -> dict[str, torch.Tensor]:
        """Reads a token a row, (rows,), and gives the logits of the next."""

    def keep(self, rows: torch.Tensor, spans: Mapping[str, Span]) -> None:
        """Only `rows` of the rollout go on; `spans` are where they lie afterwards."""


def call(facts: ModelFacts, forward: Any = None, cache: StaticRowsCache | None = None, **inputs: Any) -> torch.Tensor:
    """Logits at the last position, (rows, V). `forward`: what is called in the model's place."""
    if cache is not None:
        assert facts.cache_argument is not None
        inputs[facts.cache_argument] = cache
    inputs |= {"use_cache": cache is not None, "logits_to_keep": 1, "return_dict": True}
    accepted = {name: value for name, value in inputs.items() if name in facts.accepted or name == "return_dict"}
    forward = facts.model if forward is None else forward
    logits: torch.Tensor = forward(**accepted).logits[:, -1]
    return logits.float() if logits.dtype == torch.float64 else logits


def prompt_positions(prompts: Prompts) -> torch.Tensor:
    """Positions count a row's own tokens, so that padding moves nothing; what padding itself has is masked anyway."""
    return (prompts.mask.cumsum(-1) - 1).clamp(min=0)


class CachedReader:
    """A model with key/value caches. `forward`: what steps of standing shapes call in the model's place, a compiled
    one."""

    def __init__(self, facts: ModelFacts, rows: int, length: int, clock: Clock, forward: Any = None) -> None:
        self.facts, self.names, self.span, self.forward = facts, (facts.role,), (0, 0), forward
        self.cache = StaticRowsCache(facts.layers, rows, length, clock, facts.device)

    def start(self, prompts: Prompts, fan_out: torch.Tensor, spans: Mapping[str, Span]) -> dict[str, torch.Tensor]:
        self.span = spans[self.facts.role]
        fan_out = fan_out[slice(*self.span)]
        self.cache.start(fan_out)
        logits = call(
            self.facts,
            input_ids=prompts.ids,
            attention_mask=prompts.mask if prompts.padded else None,
            position_ids=prompt_positions(prompts),
            cache=self.cache,
        )
        self.cache.begin_steps()
        return {self.facts.role: logits[fan_out]}

    def step(self, tokens: torch.Tensor, clock: Clock) -> dict[str, torch.Tensor]:
        rows, mask = slice(*self.span), clock.read_mask()
        starts, ends = clock.read_ranges()
        with decode_window(None if starts is None else starts[rows], ends[rows]):
            logits = call(
                self.facts,
                self.forward if clock.static else None,  # shapes that grow would be compiled anew for every step
                input_ids=tokens[rows, None],
                attention_mask=None if mask is None else mask[rows],
                position_ids=clock.positions[rows],
                cache=self.cache,
            )
        return {self.facts.role: logits}

    def keep(self, rows: torch.Tensor, spans: Mapping[str, Span]) -> None:
        first, stop = self.span
        self.cache.keep(rows[(rows >= first) & (rows < stop)] - first)
        self.span = spans[self.facts.role]


class WholeTextReader:
    """A model without a cache, or not to use one: reads everything again for every token. Right, and slow."""

    def __init__(self, facts: ModelFacts, rows: int, length: int, clock: Clock) -> None:
        self.facts, self.names, self.span = facts, (facts.role,), (0, 0)
        self.text = torch.zeros(rows, length, dtype=torch.int64, device=facts.device)

    def start(self, prompts: Prompts, fan_out: torch.Tensor, spans: Mapping[str, Span]) -> dict[str, torch.Tensor]:
        self.span = spans[self.facts.role]
        fan_out = fan_out[slice(*self.span)]
        self.text[: len(fan_out), : prompts.width] = prompts.ids[fan_out]
        return {self.facts.role: self._read(prompts.ids, prompts.mask if prompts.padded else None)[fan_out]}

    def step(self, tokens: torch.Tensor, clock: Clock) -> dict[str, torch.Tensor]:
        rows, mask = slice(*self.span), clock.read_mask()
        text = self.text[: self.span[1] - self.span[0], : clock.filled + 1]
        text[:, -1] = tokens[rows]
        return {self.facts.role: self._read(text, None if mask is None else mask[rows])}

    def keep(self, rows: torch.Tensor, spans: Mapping[str, Span]) -> None:
        first, stop = self.span
        kept = rows[(rows >= first) & (rows < stop)] - first
        self.text[: len(kept)] = self.text[kept]
        self.span = spans[self.facts.role]

    def _read(self, text: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """With a mask where nothing is masked, too: XLM would take tokens of its padding's id for padding."""
        mask = torch.ones_like(text) if mask is None else mask
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        return call(self.facts, input_ids=text, attention_mask=mask, position_ids=positions, use_cache=False)
