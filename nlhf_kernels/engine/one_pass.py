"""Policy and reference in one forward pass: the batch holds the policy's rows, then the reference's.

The policy's code runs, and modules in which the two differ get forwards that treat the first rows in one way and the
rest in another: adapters act on the first rows only (lora.py), parameters are the policy's or the reference's
(pairs.py). A model may reorder its rows before such a module (flattened with the tokens, sorted by expert); a
comparison of what the modules get, in one pass and in two, detects that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..core.tokens import count_positions
from ..ops import decode_window
from .attention import reads_ranges_only
from .batch import Span
from .caches import StaticRowsCache
from .decode_state import DecodeState
from .model_info import ModelInfo
from .probes import plain_ids
from .request import Prompts
from .runners import last_logits, rows_within

PADDING, TOKENS = (2, 0, 1), 5  # of the compared texts; TOKENS is no multiple of twice their number
#: Tolerance of the comparison in shares of the spread of a module's inputs; rows in another order differ by over 1.
ROUNDING, ROUNDING_16_BIT = 0.01, 0.2


# ---- the runner ------------------------------------------------------------------------------------------------------


class OnePassRunner:
    """The policy's rows, then the reference's, in one batch over one cache. Subclasses say what tells them apart."""

    roles = ("policy", "reference")

    def __init__(self, info: ModelInfo, rows: int, length: int, state: DecodeState) -> None:
        self.info = info
        self.cache = StaticRowsCache(info.layers, rows, length, state, info.device)
        self.spans: dict[str, Span] = {}

    def split(self, first: int, rows: int) -> AbstractContextManager[None]:
        """Treat the `first` of a pass's `rows` as the policy's, and the rest as the reference's."""
        raise NotImplementedError

    def assign(self, spans: Mapping[str, Span]) -> None:
        self.spans = {role: spans[role] for role in self.roles}
        self.cache.assign(sum(stop - start for start, stop in self.spans.values()))

    def prefill(self, prompts: Prompts, fan_out: torch.Tensor) -> dict[str, torch.Tensor]:
        count = len(prompts.ids)
        policy, reference = (fan_out[slice(*self.spans[role])] for role in self.roles)
        both = torch.cat([policy, reference + count])
        self.cache.begin_prefill(both, masked_slots=not reads_ranges_only(self.info.model))
        ids, mask, positions = (
            torch.cat([value, value]) for value in (prompts.ids, prompts.mask, count_positions(prompts.mask))
        )
        logits = self._last_logits(count, ids, mask if prompts.padded else None, positions)
        self.cache.end_prefill()
        return {"policy": logits[policy], "reference": logits[reference + count]}

    def decode(self, tokens: torch.Tensor, state: DecodeState) -> dict[str, torch.Tensor]:
        mask, policy_rows = state.attention_mask(), self._policy_rows
        starts, ends = state.slot_ranges()
        with decode_window(None if starts is None else self._both(starts), self._both(ends)):
            logits = self._last_logits(
                policy_rows,
                self._both(tokens[:, None]),
                None if mask is None else self._both(mask),
                self._both(state.positions),
            )
        return {"policy": logits[:policy_rows], "reference": logits[policy_rows:]}

    def compact(self, rows: torch.Tensor, spans: Mapping[str, Span]) -> None:
        policy, reference = (rows_within(rows, self.spans[role]) for role in self.roles)
        self.cache.compact(torch.cat([policy, reference + self._policy_rows]))
        self.spans = {role: spans[role] for role in self.roles}

    @property
    def _policy_rows(self) -> int:
        return self.spans["policy"][1] - self.spans["policy"][0]

    def _both(self, per_row: torch.Tensor) -> torch.Tensor:
        return torch.cat([per_row[slice(*self.spans[role])] for role in self.roles])

    def _last_logits(
        self, policy_rows: int, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor
    ) -> torch.Tensor:
        with self.split(policy_rows, len(ids)):
            return last_logits(self.info, input_ids=ids, attention_mask=mask, position_ids=positions, cache=self.cache)


# ---- whether modules get the policy's rows first ---------------------------------------------------------------------


class RowsMixedError(RuntimeError):
    """A module whose input does not begin with the batch's rows."""


def vectors_of(rows: int, batch: int, vectors: int) -> int:
    """Return how many of a module's input vectors belong to the first `rows` of a batch of `batch` rows.

    A model may have flattened its rows of tokens to (batch * tokens, width).
    """
    tokens, rest = divmod(vectors, batch)
    if rest:
        raise RowsMixedError(f"a layer gets {vectors} vectors from a batch of {batch} rows")
    return rows * tokens


def short_texts(info: ModelInfo) -> dict[str, torch.Tensor]:
    """Return short texts, padded where the model may be given padding."""
    count = len(PADDING) * TOKENS
    ids = plain_ids(info).repeat(count)[:count].view(-1, TOKENS)
    padding = torch.tensor(PADDING, dtype=torch.int64, device=info.device) * (info.padding_fault is None)
    mask = (torch.arange(TOKENS, dtype=torch.int64, device=info.device) >= padding[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": count_positions(mask)}


def module_inputs(
    info: ModelInfo, modules: Sequence[torch.nn.Module], texts: Mapping[str, torch.Tensor]
) -> list[torch.Tensor]:
    """Return what the modules get in a forward pass, call by call, and the logits."""
    tensors: list[torch.Tensor] = []

    def keep(_: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        tensors.extend(value for value in (*arguments, *options.values()) if isinstance(value, torch.Tensor))

    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
    options: dict[str, Any] = {**texts, "use_cache": False}
    accepted = {name: value for name, value in options.items() if name in info.accepted}
    try:
        logits: torch.Tensor = info.model(**accepted, return_dict=True).logits
    finally:
        for handle in handles:
            handle.remove()
    return [*tensors, logits]


def are_joined(
    both: Sequence[torch.Tensor],
    policy: Sequence[torch.Tensor],
    reference: Sequence[torch.Tensor],
    dtypes: set[torch.dtype],
) -> bool:
    """Whether the inputs of one pass are those of the policy's pass followed by those of the reference's, up to
    rounding. `dtypes`: in which anything is computed."""
    tolerance = ROUNDING if dtypes <= {torch.float32, torch.float64} else ROUNDING_16_BIT
    return len(both) == len(policy) == len(reference) and all(
        _is_joined(*inputs, tolerance) for inputs in zip(both, policy, reference, strict=True)
    )


def _is_joined(both: torch.Tensor, policy: torch.Tensor, reference: torch.Tensor, tolerance: float) -> bool:
    if policy.shape != reference.shape or both.shape != (2 * len(policy), *policy.shape[1:]):
        return False
    expected, actual = (torch.nan_to_num(value).float() for value in (torch.cat([policy, reference]), both))
    spread = (expected - expected.mean(0)).abs().mean()
    eps = torch.finfo(both.dtype).eps if both.is_floating_point() else 0.0
    return bool((actual - expected).abs().mean() <= tolerance * spread + 4 * eps * expected.abs().mean())
