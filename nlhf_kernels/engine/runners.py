"""Runners: one model's forward passes over its rows, the prompts once and then a token per row and step.

A runner owns its cache. `roles` names the models whose logits it returns: one, or the policy and the reference at once
(one_pass.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from ..core.tokens import count_positions
from ..ops import decode_window
from .attention import reads_ranges_only
from .batch import Span
from .caches import StaticRowsCache
from .decode_state import DecodeState
from .model_info import ModelInfo
from .request import Prompts

Forward = Callable[..., Any]  # a model's forward, or the model


class Runner(Protocol):
    @property
    def roles(self) -> tuple[str, ...]:
        """The models whose logits it returns."""

    def assign(self, spans: Mapping[str, Span]) -> None:
        """Take the rows of a new batch. What the host keeps of a rollout is set here, as `prefill` may be recorded."""

    def prefill(self, prompts: Prompts, fan_out: torch.Tensor) -> dict[str, torch.Tensor]:
        """Read the prompts. Returns the logits of the first new token, {role: (rows of its span, V)}.

        `fan_out` (rows,): the prompt of each row of the batch.
        """

    def decode(self, tokens: torch.Tensor, state: DecodeState) -> dict[str, torch.Tensor]:
        """Read one token per row, (rows,). Returns the logits of the next, {role: (rows of its span, V)}."""

    def compact(self, rows: torch.Tensor, spans: Mapping[str, Span]) -> None:
        """Keep these rows of the batch; `spans` are the models' rows afterwards."""


def last_logits(
    info: ModelInfo, forward: Forward | None = None, cache: StaticRowsCache | None = None, **inputs: Any
) -> torch.Tensor:  # (rows, V)
    """Run a forward pass and return the logits at the last position.

    `forward` replaces the model's own; `inputs` that the model does not take are left out.
    """
    if cache is not None:
        assert info.cache_argument is not None
        inputs[info.cache_argument] = cache
    inputs |= {"use_cache": cache is not None, "logits_to_keep": 1, "return_dict": True}
    accepted = {name: value for name, value in inputs.items() if name in info.accepted or name == "return_dict"}
    logits: torch.Tensor = (info.model if forward is None else forward)(**accepted).logits[:, -1]
    logits = logits.float() if logits.dtype == torch.float64 else logits
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def rows_within(rows: torch.Tensor, span: Span) -> torch.Tensor:
    """Return those rows of the batch that are inside the span, counted from its start."""
    start, stop = span
    return rows[(rows >= start) & (rows < stop)] - start


class CachedRunner:
    """A model with key/value caches; `static_forward` replaces its forward in steps of static shapes."""

    def __init__(
        self, info: ModelInfo, rows: int, length: int, state: DecodeState, static_forward: Forward | None = None
    ) -> None:
        self.info, self.roles, self.span = info, (info.role,), (0, 0)
        self.static_forward = static_forward
        self.cache = StaticRowsCache(info.layers, rows, length, state, info.device)

    def assign(self, spans: Mapping[str, Span]) -> None:
        self.span = spans[self.info.role]
        self.cache.assign(self.span[1] - self.span[0])

    def prefill(self, prompts: Prompts, fan_out: torch.Tensor) -> dict[str, torch.Tensor]:
        fan_out = fan_out[slice(*self.span)]
        self.cache.begin_prefill(fan_out, masked_slots=not reads_ranges_only(self.info.model))
        logits = last_logits(
            self.info,
            input_ids=prompts.ids,
            attention_mask=prompts.mask if prompts.padded else None,
            position_ids=count_positions(prompts.mask),
            cache=self.cache,
        )
        self.cache.end_prefill()
        return {self.info.role: logits[fan_out]}

    def decode(self, tokens: torch.Tensor, state: DecodeState) -> dict[str, torch.Tensor]:
        rows, mask = slice(*self.span), state.attention_mask()
        starts, ends = state.slot_ranges()
        with decode_window(None if starts is None else starts[rows], ends[rows]):
            logits = last_logits(
                self.info,
                self.static_forward if state.static else None,  # growing shapes would be compiled anew every step
                input_ids=tokens[rows, None],
                attention_mask=None if mask is None else mask[rows],
                position_ids=state.positions[rows],
                cache=self.cache,
            )
        return {self.info.role: logits}

    def compact(self, rows: torch.Tensor, spans: Mapping[str, Span]) -> None:
        self.cache.compact(rows_within(rows, self.span))
        self.span = spans[self.info.role]


class WholeTextRunner:
    """A model whose cache is missing or disabled: it reads the whole text again for every token."""

    def __init__(self, info: ModelInfo, rows: int, length: int, state: DecodeState) -> None:
        self.info, self.roles, self.span = info, (info.role,), (0, 0)
        self.text = torch.zeros(rows, length, dtype=torch.int64, device=info.device)

    def assign(self, spans: Mapping[str, Span]) -> None:
        self.span = spans[self.info.role]

    def prefill(self, prompts: Prompts, fan_out: torch.Tensor) -> dict[str, torch.Tensor]:
        fan_out = fan_out[slice(*self.span)]
        self.text[: len(fan_out), : prompts.width] = prompts.ids[fan_out]
        return {self.info.role: self._read(prompts.ids, prompts.mask if prompts.padded else None)[fan_out]}

    def decode(self, tokens: torch.Tensor, state: DecodeState) -> dict[str, torch.Tensor]:
        rows, mask = slice(*self.span), state.attention_mask()
        text = self.text[: self.span[1] - self.span[0], : state.filled + 1]
        text[:, -1] = tokens[rows]
        return {self.info.role: self._read(text, None if mask is None else mask[rows])}

    def compact(self, rows: torch.Tensor, spans: Mapping[str, Span]) -> None:
        rows = rows_within(rows, self.span)
        self.text[: len(rows)] = self.text[rows]
        self.span = spans[self.info.role]

    def _read(self, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        # Some models take certain ids for padding where no mask is passed.
        mask = torch.ones_like(ids) if mask is None else mask
        return last_logits(self.info, input_ids=ids, attention_mask=mask, position_ids=count_positions(mask))
