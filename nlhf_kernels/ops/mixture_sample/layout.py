"""What the backends of mixture_sample share: inputs, and how the result is allocated."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...core.prepared import Result

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


def sample_results(inputs: MixtureSampleInputs) -> tuple[Result, Result, Result]:
    """Return shapes and dtypes of tokens, logprobs and ok."""
    rows = inputs.rows
    return (
        Result((rows,), torch.int64), Result((len(inputs.logits) + 1, rows), torch.float32), Result((rows,), torch.bool)
    )  # fmt: skip


def empty_sample(inputs: MixtureSampleInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Allocate tokens, logprobs and ok: what the fake returns and the kernels fill."""
    device = inputs.device
    tokens, logprobs, ok = sample_results(inputs)
    return (
        torch.empty(tokens.shape, dtype=tokens.dtype, device=device),
        torch.empty(logprobs.shape, dtype=logprobs.dtype, device=device),
        torch.empty(ok.shape, dtype=ok.dtype, device=device),
    )
