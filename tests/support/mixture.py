"""Shared code of mixture_sample's tests: inputs, and the check of a draw in float64."""

from __future__ import annotations

import torch

from nlhf_kernels.ops.mixture_sample import oracle
from nlhf_kernels.ops.mixture_sample.op import MixtureSample
from nlhf_kernels.ops.mixture_sample.settings import mixture_settings
from tests.support.tolerances import assert_accurate

#: How far float32 rounding may move the boundary between two tokens, in units of probability. A draw whose uniform
#: falls into that gap may give either neighbour; with Gaussian logits over 4097 tokens about one draw in 10,000 does.
BOUNDARY = 2e-6


def logits_pair(rows: int, vocabulary: int, device, dtypes=(torch.float32, torch.float32), scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed + 7919 * rows + vocabulary)
    return [(scale * torch.randn(rows, vocabulary, generator=generator)).to(device, dtype) for dtype in dtypes]


def uniforms_for(rows: int, device, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


def assert_right(
    result: MixtureSample, policy, reference, beta, uniforms, *, bias=None, constant: float = 4.0, **filters
) -> None:
    """Assert that every token's float64 interval of the CDF, widened by BOUNDARY, holds the row's uniform, that every
    log-probability's error is at most twice PyTorch's in float32, and that every token is in the support."""
    logits = [policy] if reference is None else [policy, reference]
    weights = [1.0] if reference is None else [1 - beta, beta]
    packed = mixture_settings(weights, device=policy.device, **filters).packed
    temperature = packed[:, 0, None].double()
    shrunk = torch.where(temperature > 0, temperature, 1)
    keep = oracle.support(_scaled([model.float() for model in logits], packed, bias, shrunk), packed)
    scaled = _scaled([model.double() for model in logits], packed, bias, shrunk).masked_fill(~keep, -torch.inf)
    mass = scaled.softmax(-1)
    upper = mass.cumsum(-1)
    at = result.tokens.unsqueeze(-1)
    picked = mass.gather(-1, at).squeeze(-1)
    greedy = (temperature <= 0).squeeze(-1).expand(len(uniforms))
    high = upper.gather(-1, at).squeeze(-1)
    inside = (uniforms <= high + BOUNDARY) & (uniforms >= high - picked - BOUNDARY)
    assert result.ok.all()
    assert (picked > 0).all(), "a token outside the support was drawn"
    assert (inside | greedy).all(), f"rows {(~(inside | greedy)).nonzero().flatten().tolist()[:8]}"
    assert (result.tokens == scaled.argmax(-1))[greedy].all()

    take = lambda values: values.log_softmax(-1).gather(-1, at).squeeze(-1)  # noqa: E731
    for got, model in ((result.policy_logprob, policy), (result.reference_logprob, reference)):
        if got is not None:
            assert (got <= 0).all()
            assert_accurate(got, take(model.double()), take(model.float()), constant=constant)
    if result.mixture_logprob is not None:
        truth = torch.where(greedy, 0, take(scaled))
        pytorch = torch.where(greedy, 0, take(scaled.float()))
        assert (result.mixture_logprob <= 0).all()
        assert_accurate(result.mixture_logprob, truth, pytorch, constant=constant)


def _scaled(logits, packed, bias, temperature) -> torch.Tensor:
    mixed = oracle.mixed_logits(logits, packed[:, oracle.WEIGHTS :], bias)
    return mixed / temperature.to(mixed.dtype)
