"""The oracle: log-probabilities, entropy and KL of each row in plain PyTorch, and their gradient from its formula.

The equations are numbered in README.md. Arithmetic is float32, or float64 where the logits are.
"""

from __future__ import annotations

import torch

from .layout import (
    ELSEWHERE,
    IGNORED,
    Extra,
    LogprobsBackwardInputs,
    LogprobsInputs,
    Output,
    Transform,
    empty_outputs,
    real_dtype,
)


def logprobs(inputs: LogprobsInputs) -> tuple[torch.Tensor, torch.Tensor]:  # values (5, N), normalizers (6, N)
    policy, reference, targets, beta, settings, _ = inputs
    real = real_dtype(policy.dtype)
    values, normalizers = (output.zero_() for output in empty_outputs(inputs))
    inside = (targets >= 0) & (targets < policy.shape[1])
    index = torch.where(inside, targets, 0).unsqueeze(1)

    def of_target(log_probabilities: torch.Tensor) -> torch.Tensor:
        return log_probabilities.gather(1, index).squeeze(1)

    scores = transformed(policy.to(real), settings.policy)
    log_p, normalizers[0], normalizers[1] = _log_softmax(scores, settings.temperature)
    values[Output.POLICY] = of_target(log_p)
    if settings.computes(Extra.ENTROPY):
        values[Output.ENTROPY] = -_expectation(log_p, log_p)
    if reference is not None:
        reference_scores = transformed(reference.to(real), settings.reference)
        log_q, normalizers[2], normalizers[3] = _log_softmax(reference_scores, settings.temperature)
        values[Output.REFERENCE] = of_target(log_q)
        if settings.computes(Extra.KL):
            values[Output.KL] = _expectation(log_p, log_p - log_q).clamp(min=0)
        if settings.computes(Extra.MIXTURE):
            mixture = mixed(scores, reference_scores, beta)
            log_m, normalizers[4], normalizers[5] = _log_softmax(mixture, settings.temperature)
            values[Output.MIXTURE] = of_target(log_m)
    values.masked_fill_(~inside, torch.nan)
    ignored = targets == IGNORED
    return values.masked_fill_(ignored, 0), normalizers.masked_fill_(ignored, 0)


def logprobs_backward(inputs: LogprobsBackwardInputs, out: torch.Tensor) -> None:
    """Write the gradient (N, V) to `out`, which may be the policy's logits themselves."""
    values, normalizers, upstream, forward = inputs
    policy, reference, targets, beta, settings, _ = forward
    real = real_dtype(policy.dtype)
    scores = transformed(policy.to(real), settings.policy)
    log_p = _from_normalizers(scores, normalizers[0:2], settings.temperature)
    p = log_p.exp()
    inside = (targets >= 0) & (targets < policy.shape[1])
    index = torch.where(inside, targets, 0).unsqueeze(1)
    of_target = torch.zeros_like(p).scatter_(1, index, inside.to(p.dtype).unsqueeze(1))
    by_row = upstream.unsqueeze(-1)
    gradient = by_row[Output.POLICY] * (of_target - p)  # equation 5
    if settings.computes(Extra.ENTROPY):
        entropy = values[Output.ENTROPY].unsqueeze(-1)
        gradient -= _scaled(by_row[Output.ENTROPY], p, log_p + entropy)  # equation 6
    if reference is not None and settings.extras & (Extra.KL | Extra.MIXTURE):
        reference_scores = transformed(reference.to(real), settings.reference)
        if settings.computes(Extra.KL):
            log_q = _from_normalizers(reference_scores, normalizers[2:4], settings.temperature)
            kl = values[Output.KL].unsqueeze(-1)
            gradient += _scaled(by_row[Output.KL], p, log_p - log_q - kl)  # equation 7
        if settings.computes(Extra.MIXTURE):
            mixture = mixed(scores, reference_scores, beta)
            m = _from_normalizers(mixture, normalizers[4:6], settings.temperature).exp()
            share = 1 - _column(beta)
            gradient += share * _scaled(by_row[Output.MIXTURE], torch.ones_like(m), of_target - m)  # equation 8
    gradient = gradient * slope(scores, settings.policy) / settings.temperature
    gradient.masked_fill_(~(inside | (targets == ELSEWHERE)).unsqueeze(1), torch.nan)
    out.copy_(gradient.masked_fill_((targets == IGNORED).unsqueeze(1), 0))


def transformed(logits: torch.Tensor, transform: Transform) -> torch.Tensor:
    """Apply the model's scale and softcap to its head's products (equation 1)."""
    logits = logits if transform.scale == 1 else logits * transform.scale
    return logits if transform.softcap == 0 else torch.tanh(logits / transform.softcap) * transform.softcap


def slope(scores: torch.Tensor, transform: Transform) -> torch.Tensor:
    """Return the derivative of `transformed`, from its result."""
    saturation = 0 if transform.softcap == 0 else (scores / transform.softcap) ** 2
    return torch.full_like(scores, transform.scale) * (1 - saturation)


def mixed(scores: torch.Tensor, reference_scores: torch.Tensor, beta: torch.Tensor | None) -> torch.Tensor:
    """Return (1 - beta) u + beta v; a term of weight 0 is left out, since 0 * -inf is NaN."""
    weight = _column(beta)
    both = (1 - weight) * scores + weight * reference_scores
    return torch.where(weight == 0, scores, torch.where(weight == 1, reference_scores, both))


def _column(beta: torch.Tensor | None) -> torch.Tensor:
    assert beta is not None, "the mixture needs beta"
    return beta.reshape(-1, 1)


def _log_softmax(scores: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log_softmax(scores / temperature), the largest score, the logarithm of the sum relative to it."""
    top = scores.amax(dim=1)
    shifted = (scores - top.unsqueeze(1)) / temperature
    log_sum = torch.logsumexp(shifted, dim=1)
    return shifted - log_sum.unsqueeze(1), top, log_sum


def _from_normalizers(scores: torch.Tensor, normalizers: torch.Tensor, temperature: float) -> torch.Tensor:
    top, log_sum = normalizers.unsqueeze(-1)
    log_p: torch.Tensor = (scores - top) / temperature - log_sum
    return log_p


def _expectation(log_p: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """Return sum_i p_i of_i; a token of probability 0 contributes 0, whatever its `of`."""
    p = log_p.exp()
    return torch.where(p == 0, 0, p * of).sum(dim=1)


def _scaled(factor: torch.Tensor, p: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """Return factor * p * of; 0 where factor or p is 0."""
    return torch.where((factor == 0) | (p == 0), 0, factor * p * of)
