"""What has been drawn, and which rows have ended. Written a step at a time, on the device, without looking at values.

A row that has ended goes on decoding until the next check takes it out of the batch; what it says meanwhile is cut off
at the end, here. So a step costs no bookkeeping but the writing itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .result import Finish, Responses


class Ledger:
    """(T, rows) buffers. Rows are numbered as asked for, wherever in the batch they are decoded."""

    def __init__(self, steps: int, rows: int, logprobs: Sequence[str], device: torch.device) -> None:
        self.capacity = steps
        self.tokens = torch.zeros(steps, rows, dtype=torch.int64, device=device)
        self.ok = torch.zeros(steps, rows, dtype=torch.bool, device=device)
        self.logprobs = {name: torch.zeros(steps, rows, dtype=torch.float32, device=device) for name in logprobs}

    def start(self, rows: int, steps: int, ends: torch.Tensor) -> None:
        """`ends` (E,): the end tokens. Every row is as long as it may get, until it is found to have ended."""
        self.rows, self.ends = rows, ends
        self.lengths = torch.full((rows,), steps, dtype=torch.int64, device=ends.device)
        self.finish = torch.full((rows,), Finish.LENGTH, dtype=torch.int8, device=ends.device)

    def write(
        self, step: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor, ok: torch.Tensor
    ) -> None:  # (), (n,), (n,), (n,)
        self.tokens.index_put_((step, rows), tokens)
        self.ok.index_put_((step, rows), ok)

    def write_logprob(self, name: str, step: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
        self.logprobs[name].index_put_((step, rows), values)

    @property
    def open(self) -> torch.Tensor:  # (rows,) bool
        return self.finish == Finish.LENGTH

    def settle(self, start: int, stop: int) -> None:
        """Look for end tokens among steps [start, stop)."""
        if stop > start and len(self.ends):
            ended = torch.isin(self.tokens[start:stop, : self.rows], self.ends)
            first = ended.int().argmax(0) + start + 1
            self._close(ended.any(0), first, Finish.END)

    def stop(self, rows: torch.Tensor, step: int) -> None:  # (rows,) bool
        """Whatever else they were up to, these rows end with the token of `step`."""
        self._close(rows, torch.full_like(self.lengths, step + 1), Finish.STOPPED)

    def _close(self, rows: torch.Tensor, lengths: torch.Tensor, reason: Finish) -> None:
        closing = rows & self.open
        self.lengths = torch.where(closing, lengths, self.lengths)
        self.finish = self.finish.masked_fill(closing, int(reason))

    def responses(self, rows: slice, width: int, pad: int) -> Responses:
        """Copies: the buffers serve the next rollout."""
        lengths = self.lengths[rows]
        mask = torch.arange(width, dtype=torch.int64, device=lengths.device) < lengths[:, None]

        def column(kept: torch.Tensor) -> torch.Tensor:
            return kept[:width, rows].T

        logprobs = {f"{name}_logprobs": column(kept).masked_fill(~mask, 0.0) for name, kept in self.logprobs.items()}
        return Responses(
            tokens=column(self.tokens).masked_fill(~mask, pad),
            mask=mask,
            lengths=lengths,
            finish=self.finish[rows],
            policy_logprobs=logprobs.get("policy_logprobs"),
            reference_logprobs=logprobs.get("reference_logprobs"),
            mixture_logprobs=logprobs.get("mixture_logprobs"),
            ok=(column(self.ok) | ~mask).all(1),
        )
