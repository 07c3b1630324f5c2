"""mixture_sample in plain PyTorch: the oracle. Equation numbers are those of README.md.

Arithmetic is float32, or float64 where a model's logits are float64 (the truth in tests); sums are float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...core import rng
from .layout import MixtureSampleInputs

TEMPERATURE, TOP_K, TOP_P, MIN_P, WEIGHTS = range(5)  # columns of the packed settings; a weight per model from WEIGHTS


def mixture_sample(inputs: MixtureSampleInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens, logprobs, which are NaN where unasked, and ok."""
    logits, settings = inputs.logits, inputs.settings
    rows, vocabulary = logits[0].shape
    temperature = settings[:, TEMPERATURE, None]
    greedy = (temperature <= 0).expand(rows, 1).squeeze(1)
    mixed = mixed_logits(logits, settings[:, WEIGHTS:], inputs.bias)
    scaled = mixed / torch.where(temperature <= 0, 1, temperature)  # (1)
    if inputs.filtered:
        scaled = scaled.masked_fill(~support(scaled, settings), -torch.inf)

    top = scaled.max(-1, keepdim=True).values
    mass = torch.exp((scaled - top).double())  # (R, V)
    cumulative = mass.cumsum(-1)
    total = cumulative[:, -1:]
    ok = total.squeeze(-1).isfinite() & top.squeeze(-1).isfinite()
    uniforms = inputs.uniforms
    if uniforms is None:
        seed, row_ids, step = inputs.seed, inputs.row_ids, inputs.step
        assert seed is not None and row_ids is not None and step is not None, "the operator checks it"
        uniforms = rng.open_unit(rng.random_bits(seed, row_ids, step, inputs.stream))
    beyond = cumulative > uniforms.unsqueeze(-1) * total  # (2)
    last = vocabulary - 1 - (mass > 0).flip(-1).long().argmax(-1)  # where rounding leaves none beyond
    tokens = torch.where(beyond.any(-1), beyond.long().argmax(-1), last)
    tokens = torch.where(greedy, scaled.nan_to_num(nan=-torch.inf).argmax(-1), tokens)
    tokens = torch.where(ok, tokens, 0)

    logprobs = torch.full((len(logits) + 1, rows), torch.nan, dtype=torch.float32, device=settings.device)
    for m, model in enumerate(logits):
        if inputs.logprob_mask >> m & 1:
            logprobs[m] = model.double().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    if inputs.logprob_mask >> len(logits) & 1:
        log_mass = (scaled - top).double().gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - total.squeeze(-1).log()
        logprobs[-1] = torch.where(greedy, 0.0, log_mass)
    logprobs.masked_fill_(~ok, torch.nan)
    broken = ~ok
    for index in range(len(logprobs)):
        if inputs.logprob_mask >> index & 1:
            broken = broken | logprobs[index].isnan()
    return tokens, logprobs, ~broken


def mixed_logits(
    logits: Sequence[torch.Tensor], weights: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:  # (R, V)
    """Return sum_m w_m z_m + bias. A model of weight 0 is left out: 0 * -inf is NaN."""
    double = any(model.dtype == torch.float64 for model in logits)
    dtype = torch.float64 if double else torch.float32
    weights = weights.to(dtype)
    mixed = torch.zeros(logits[0].shape, dtype=dtype, device=logits[0].device)
    for m, model in enumerate(logits):
        weight = weights[:, m, None]
        mixed = mixed + torch.where(weight == 0, 0, weight * model.to(dtype))
    return mixed if bias is None else mixed + bias.to(dtype)


def support(scaled: torch.Tensor, settings: torch.Tensor) -> torch.Tensor:  # (R, V) bool
    """Return what the filters keep, in transformers' order: top-k, then top-p of what is left, then min-p. (3)-(5)

    Each is a threshold; values equal to the threshold are all kept, so no filter depends on the order of ties.
    """
    vocabulary = scaled.shape[1]
    ordered = scaled.sort(-1, descending=True).values
    k = settings[:, TOP_K].long().expand(len(scaled))
    kth = ordered.gather(-1, (k.clamp(1, vocabulary) - 1).unsqueeze(-1))
    at_least = torch.where((k > 0).unsqueeze(-1), kth, -torch.inf)

    mass = torch.exp((ordered - ordered[:, :1]).double()).masked_fill(ordered < at_least, 0)
    above = mass.cumsum(-1) - mass  # of strictly larger values, at the first of equal ones
    top_p = settings[:, TOP_P, None].to(torch.float64)
    nucleus = (above < top_p * mass.sum(-1, keepdim=True)) & (ordered >= at_least)
    nucleus[:, 0] = True
    smallest = ordered.masked_fill(~nucleus, torch.inf).min(-1, keepdim=True).values
    at_least = torch.where(top_p < 1, torch.maximum(at_least, smallest), at_least)

    min_p = settings[:, MIN_P, None].to(scaled.dtype)
    return (scaled >= at_least) & (scaled >= ordered[:, :1] + min_p.log())
