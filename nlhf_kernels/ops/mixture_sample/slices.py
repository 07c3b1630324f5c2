"""Sample from logits that several processes share: each holds a slice of the vocabulary and reads no other.

Three steps with a collective between them (README.md, "Slices of the vocabulary"): the `sums` of each slice, one
candidate token per slice (`candidates`), and the choice of the slice in which the row's uniform falls (`sample`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...core.checks import check_integer
from ...core.vocabulary import VocabularySlice, is_dtensor, same_slice, slice_of
from .layout import MixtureSampleInputs
from .oracle import TEMPERATURE, WEIGHTS, mixed_logits

_TOP, _TOTAL, _MODELS = 0, 1, 2  # rows of `sums`: largest z, sum of exp(z - it), then each model's log-sum-exp
_LARGEST = 1 - 2**-53  # the largest uniform below 1


def local_logits(
    op: str, named_logits: dict[str, Any], bias: Any, vocab_size: int | None
) -> tuple[dict[str, Any], Any, VocabularySlice | None]:
    """Return logits and bias as plain tensors: of this process's slice, where several share the vocabulary."""
    if not any(map(is_dtensor, named_logits.values())):
        return named_logits, bias, None
    parts = {
        name: slice_of(model, 1) if is_dtensor(model) and model.ndim == 2 else None
        for name, model in named_logits.items()
    }
    part = next(iter(parts.values()))
    for name, other in parts.items():
        if other is None or not same_slice(other, part):
            raise ValueError(
                f"{op}: {name}: expected, as of every model or of none, a DTensor (rows, vocabulary) whose columns one "
                "mesh dimension named 'tp' shares; got another layout"
            )
    assert part is not None
    stop = part.stop
    if vocab_size is not None:
        stop = min(stop, check_integer(op, "vocab_size", vocab_size, 1, part.total))
    width = max(0, stop - part.first)
    if isinstance(bias, torch.Tensor):
        columns = part.total if vocab_size is None else vocab_size
        if bias.shape[-1:] != (columns,):
            raise ValueError(
                f"{op}: bias: expected {columns} columns, of the whole vocabulary; got {tuple(bias.shape)}"
            )
        bias = bias[..., part.first : part.first + width]
    return {name: model.detach().to_local()[:, :width] for name, model in named_logits.items()}, bias, part


@dataclass(frozen=True)
class SliceOfDraw:
    """One process's part of a draw.

    Args:
        inputs (MixtureSampleInputs): logits (R, W) of this slice's W tokens, which may be none; without filters.
        uniforms ((R,) float64): the same in all processes.
        part (VocabularySlice): this process's.
        draw (function): uniforms (R,) -> a token of this slice (R,), by the kernels.
    """

    inputs: MixtureSampleInputs
    uniforms: torch.Tensor
    part: VocabularySlice
    draw: Callable[[torch.Tensor], torch.Tensor]

    def run(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return tokens (R,), log-probabilities (models + 1, R), ok (R,), as the kernels do: two collectives."""
        sums = self.part.gathered(self.sums())
        return self.sample(sums, self.part.gathered(self.candidates(sums)))

    def sums(self) -> torch.Tensor:  # (2 + models, R) float64
        rows = len(self.uniforms)
        result = torch.zeros(_MODELS + len(self.inputs.logits), rows, dtype=torch.float64, device=self.uniforms.device)
        if not self.inputs.logits[0].shape[1]:
            result[_TOP], result[_MODELS:] = -torch.inf, -torch.inf
            return result
        scaled = self._scaled(self.inputs.logits, self.inputs.bias)
        top = scaled.amax(1)
        mass = torch.exp(scaled - torch.where(top == -torch.inf, 0, top)[:, None])
        result[_TOP], result[_TOTAL] = top, mass.sum(1, dtype=torch.float64)
        for m, model in enumerate(self.inputs.logits):
            if self.inputs.logprob_mask >> m & 1:
                result[_MODELS + m] = model.float().logsumexp(1)
        return result

    def candidates(self, sums: torch.Tensor) -> torch.Tensor:  # (S, 2 + models, R) -> (2 + models, R) float64
        """Return this slice's candidate token for each row, its z, and its logit under each model."""
        rows = len(self.uniforms)
        if not self.inputs.logits[0].shape[1]:
            return torch.zeros(2 + len(self.inputs.logits), rows, dtype=torch.float64, device=self.uniforms.device)
        shares = _shares(sums)
        before, share = shares[: self.part.rank].sum(0), shares[self.part.rank]
        inside = (self.uniforms * shares.sum(0) - before) / share  # the uniform, rescaled to this slice
        tokens = self.draw(inside.nan_to_num(0.0, 0.0, 0.0).clamp(0, _LARGEST))
        at = tokens[:, None]
        of_token = [model.gather(1, at) for model in self.inputs.logits]
        bias = self.inputs.bias if self.inputs.bias is None else self.inputs.bias.expand(rows, -1).gather(1, at)
        z = self._scaled(of_token, bias)
        parts = [tokens + self.part.first, z.squeeze(1), *(logit.squeeze(1) for logit in of_token)]
        return torch.stack([part.double() for part in parts])

    def sample(self, sums: torch.Tensor, candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the candidate of the slice in which the uniform falls: equal inputs, so equal in all processes."""
        shares, tops = _shares(sums), sums[:, _TOP]
        cumulative = shares.cumsum(0)
        total, top = cumulative[-1], tops.amax(0)
        beyond = cumulative > self.uniforms * total  # (2), of slices
        last = len(shares) - 1 - (shares > 0).flip(0).long().argmax(0)
        owner = torch.where(beyond.any(0), beyond.long().argmax(0), last)
        greedy = self.inputs.settings[:, TEMPERATURE] <= 0
        owner = torch.where(greedy, tops.argmax(0), owner)
        tokens, z, *of_models = candidates.gather(0, owner.expand(1, *candidates.shape[1:]))[0]

        ok = total.isfinite() & top.isfinite()
        logprobs = torch.full_like(candidates[0, 1:], torch.nan)  # (1 + models, R), the mixture last
        for m, logit in enumerate(of_models):
            if self.inputs.logprob_mask >> m & 1:
                log_sum = sums[:, _MODELS + m].logsumexp(0)
                logprobs[m] = torch.where(log_sum == torch.inf, torch.nan, logit - log_sum).clamp(max=0)
        if self.inputs.logprob_mask >> len(of_models) & 1:
            logprobs[-1] = torch.where(greedy, 0.0, (z - top - total.log()).clamp(max=0))
        logprobs.masked_fill_(~ok, torch.nan)
        broken = ~ok
        for index, row in enumerate(logprobs):
            if self.inputs.logprob_mask >> index & 1:
                broken = broken | row.isnan()
        return torch.where(ok, tokens, 0).long(), logprobs.float(), ~broken

    def _scaled(self, logits: Sequence[torch.Tensor], bias: torch.Tensor | None) -> torch.Tensor:
        """Return z of equation 1."""
        temperature = self.inputs.settings[:, TEMPERATURE, None]
        mixed = mixed_logits(logits, self.inputs.settings[:, WEIGHTS:], bias)
        return mixed / torch.where(temperature <= 0, 1, temperature)


def _shares(sums: torch.Tensor) -> torch.Tensor:  # (S, 2 + models, R) -> (S, R)
    """Return each slice's mass, relative to the largest z of all slices."""
    tops, totals = sums[:, _TOP], sums[:, _TOTAL]
    return torch.where(tops == -torch.inf, 0, totals * torch.exp(tops - tops.amax(0)))
