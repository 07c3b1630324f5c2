"""Adapters over a base that is also the reference: readers that serve both from one set of weights.

Where one forward pass can serve both (one_pass.py), it reads the base's weights once. Elsewhere two passes go over the
one model, adapters switched off for the reference's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..ops import decode_window
from .caches import StaticRowsCache
from .clock import Clock
from .models import ModelFacts
from .one_pass import adapter_on_first_rows
from .peft_models import adapted_layers, adapters_off
from .readers import Reader, Span, call, prompt_positions
from .request import Prompts


class SharedReader:
    """The policy's rows with the adapter and the reference's without, in one batch."""

    names = ("policy", "reference")

    def __init__(self, facts: ModelFacts, rows: int, length: int, clock: Clock) -> None:
        self.facts = facts
        self.layers: list[Any] = []  # that are adapted
        self.cache = StaticRowsCache(facts.layers, rows, length, clock, facts.device)
        self.spans: dict[str, Span] = {}

    def start(self, prompts: Prompts, fan_out: torch.Tensor, spans: Mapping[str, Span]) -> dict[str, torch.Tensor]:
        self._take(spans)
        self.layers = adapted_layers(self.facts.model)
        count = len(prompts.ids)
        policy, reference = (fan_out[slice(*self.spans[name])] for name in self.names)
        self.cache.start(torch.cat([policy, reference + count]))
        twice = [torch.cat([value, value]) for value in (prompts.ids, prompts.mask, prompt_positions(prompts))]
        logits = self._call(count, twice[0], twice[1] if prompts.padded else None, twice[2])
        self.cache.begin_steps()
        return {"policy": logits[policy], "reference": logits[reference + count]}

    def step(self, tokens: torch.Tensor, clock: Clock) -> dict[str, torch.Tensor]:
        mask, split = clock.read_mask(), self._policy_rows
        starts, ends = clock.read_ranges()
        with decode_window(None if starts is None else self._both(starts), self._both(ends)):
            logits = self._call(
                split,
                self._both(tokens[:, None]),
                None if mask is None else self._both(mask),
                self._both(clock.positions),
            )
        return {"policy": logits[:split], "reference": logits[split:]}

    def keep(self, rows: torch.Tensor, spans: Mapping[str, Span]) -> None:
        kept = []
        for name, offset in (("policy", 0), ("reference", self._policy_rows)):
            first, stop = self.spans[name]
            kept.append(rows[(rows >= first) & (rows < stop)] - first + offset)
        self.cache.keep(torch.cat(kept))
        self._take(spans)

    def _take(self, spans: Mapping[str, Span]) -> None:
        self.spans = {name: spans[name] for name in self.names}

    @property
    def _policy_rows(self) -> int:
        return self.spans["policy"][1] - self.spans["policy"][0]

    def _both(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows[slice(*self.spans[name])] for name in self.names])

    def _call(
        self, policy_rows: int, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor
    ) -> torch.Tensor:
        with adapter_on_first_rows(self.layers, policy_rows, len(ids)):
            return call(
                self.facts,
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                cache=self.cache,
            )


class BaseReader:
    """The base of an adapted model, where one pass cannot serve both: another reader of it, adapters off."""

    def __init__(self, adapted: Any, reader: Reader) -> None:
        self.adapted, self.reader = adapted, reader

    @property
    def names(self) -> tuple[str, ...]:
        return self.reader.names

    def start(self, prompts: Prompts, fan_out: torch.Tensor, spans: Mapping[str, Span]) -> dict[str, torch.Tensor]:
        with adapters_off(self.adapted):
            return self.reader.start(prompts, fan_out, spans)

    def step(self, tokens: torch.Tensor, clock: Clock) -> dict[str, torch.Tensor]:
        with adapters_off(self.adapted):
            return self.reader.step(tokens, clock)

    def keep(self, rows: torch.Tensor, spans: Mapping[str, Span]) -> None:
        self.reader.keep(rows, spans)
