"""What the backends of mixture_sample share: inputs, and how the result is allocated."""

from __future__ import annotations

from typing import NamedTuple

import torch

MAX_MODELS = 4


class MixtureSampleInputs(NamedTuple):
    logits: list[torch.Tensor]  # one to four of (R, V); elements of a row lie side by side
    settings: torch.Tensor  # (R or 1, 4 + models) float32, see `mixture_settings`
    filtered: bool  # whether any row has a filter
    bias: torch.Tensor | None  # (V,) or (R, V) float32
    uniforms: torch.Tensor | None  # (R,) float64; None: drawn from the next three
    seed: torch.Tensor | None  # () or (R,) int64
    row_ids: torch.Tensor | None  # (R,) int64
    step: torch.Tensor | None  # () or (R,) int64
    stream: int
    logprob_mask: int  # bit m: the log-probability under model m; bit `models`: under the mixture
    backend: str

    @property
    def rows(self) -> int:
        return self.logits[0].shape[0]

    @property
    def vocabulary(self) -> int:
        return self.logits[0].shape[1]

    @property
    def device(self) -> torch.device:
        return self.logits[0].device


def empty_sample(inputs: MixtureSampleInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Allocate tokens, logprobs and ok: what the fake returns and the kernels fill."""
    logits = inputs.logits
    rows, device = logits[0].shape[0], logits[0].device
    return (
        torch.empty(rows, dtype=torch.int64, device=device),
        torch.empty((len(logits) + 1, rows), dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.bool, device=device),
    )
