"""Output buffers: sampled tokens, their log-probabilities, and which rows have ended.

Written a step at a time on the device, without reading values. A row that has ended goes on decoding until the next
check removes it from the batch; the tokens after its end are cut off in `TokenBuffers.responses`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .request import Finish, Responses


class TokenBuffers:
    """(T, rows) buffers. A row keeps its place here, wherever in the batch it is decoded."""

    def __init__(self, steps: int, rows: int, logprobs: Sequence[str], device: torch.device) -> None:
        self.tokens = torch.zeros(steps, rows, dtype=torch.int64, device=device)
        self.ok = torch.zeros(steps, rows, dtype=torch.bool, device=device)
        self._logprobs = torch.zeros(len(logprobs), steps, rows, dtype=torch.float32, device=device)
        self._names = torch.arange(len(logprobs), dtype=torch.int64, device=device)[:, None]
        self.logprobs = dict(zip(logprobs, self._logprobs, strict=True))

    def reset(self, rows: int, steps: int, end_ids: torch.Tensor) -> None:
        """Begin a rollout. Every row counts as `steps` long until its end is found."""
        self.rows, self.end_ids = rows, end_ids
        self.lengths = torch.full((rows,), steps, dtype=torch.int64, device=end_ids.device)
        self.finish = torch.full((rows,), Finish.LENGTH, dtype=torch.int8, device=end_ids.device)

    def write(
        self, step: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor, ok: torch.Tensor
    ) -> None:  # (), (n,), (n,), (n,)
        self.tokens.index_put_((step, rows), tokens)
        self.ok.index_put_((step, rows), ok)

    def write_logprobs(
        self, step: torch.Tensor, rows: torch.Tensor, values: torch.Tensor
    ) -> None:  # (), (n,), (names, n)
        self._logprobs.index_put_((self._names, step, rows), values)

    @property
    def is_open(self) -> torch.Tensor:  # (rows,) bool
        return self.finish == Finish.LENGTH

    def find_ends(self, start: int, stop: int) -> None:
        """Look for end tokens among steps [start, stop)."""
        if stop > start and len(self.end_ids):
            ended = torch.isin(self.tokens[start:stop, : self.rows], self.end_ids)
            first = ended.int().argmax(0) + start + 1
            self._close(ended.any(0), first, Finish.END)

    def stop(self, rows: torch.Tensor, step: int) -> None:  # (rows,) bool
        """End the open rows among these with the token of `step`."""
        self._close(rows, torch.full_like(self.lengths, step + 1), Finish.STOPPED)

    def _close(self, rows: torch.Tensor, lengths: torch.Tensor, reason: Finish) -> None:
        closing = rows & self.is_open
        self.lengths = torch.where(closing, lengths, self.lengths)
        self.finish = self.finish.masked_fill(closing, int(reason))

    def responses(self, rows: slice, width: int, pad_id: int) -> Responses:
        """Copy these rows out, as the buffers serve the next rollout."""
        lengths = self.lengths[rows]
        mask = torch.arange(width, dtype=torch.int64, device=lengths.device) < lengths[:, None]
        logprobs = {name: values[:width, rows].T.masked_fill(~mask, 0.0) for name, values in self.logprobs.items()}
        return Responses(
            tokens=self.tokens[:width, rows].T.masked_fill(~mask, pad_id),
            mask=mask,
            lengths=lengths,
            finish=self.finish[rows],
            policy_logprobs=logprobs.get("policy"),
            reference_logprobs=logprobs.get("reference"),
            mixture_logprobs=logprobs.get("mixture"),
            ok=(self.ok[:width, rows].T | ~mask).all(1),
        )


class OpenRowsReader:
    """Copies `TokenBuffers.is_open` to the host without stalling the device.

    On a GPU a check gets the flags of the check before, whose copy it waits for. The steps between the two are queued
    by then, so the device does not idle, and the host is never further ahead than that. Rows never reopen: old flags
    only keep rows in the batch a little longer.
    """

    def __init__(self) -> None:
        self._pending: tuple[torch.Tensor, torch.cuda.Event | None] | None = None

    def exchange(self, is_open: torch.Tensor, now: bool = False) -> list[bool] | None:  # (rows,) bool
        """Start a copy and return the flags of the last call, None at the first; `now` returns those of this call."""
        before, self._pending = self._pending, self._copy(is_open)
        flags, event = self._pending
        if event is not None and not now:
            if before is None:
                return None
            flags, event = before
        if event is not None:
            event.synchronize()
        return flags.tolist()

    def _copy(self, is_open: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Return flags on the host, and the event after which they are there; None: now."""
        if is_open.device.type != "cuda":
            return is_open, None
        host = torch.empty(is_open.shape, dtype=torch.bool, device="cpu", pin_memory=True)
        host.copy_(is_open, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host, event
