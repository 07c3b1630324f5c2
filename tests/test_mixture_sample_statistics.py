"""mixture_sample as a distribution: chi-square over every token, a heavy tail, independence, and how rare ties are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import nlhf_kernels
from tests.support.backends import DEVICE, call, device_of, every_backend, every_rival
from tests.support.mixture import BOUNDARY, logits_pair
from tests.support.statistics import assert_plausible, chi_square_p, proportion_p

#: Draws per chi-square test, limited to seconds per backend. Interpreted Triton takes a fifth of a second per row, so
#: it draws few from a small vocabulary; test_mixture_sample.py compares its every draw with float64.
DRAWS = {"torch": 40_000, "triton": 400_000, "cuda": 400_000, "cpu": 400_000}
INTERPRETED_DRAWS = 60


def interpreted(backend: str) -> bool:
    return backend == "triton" and DEVICE.type == "cpu"


def draws(backend: str, logits: list[torch.Tensor], count: int, seed: int, **options) -> np.ndarray:
    """Draw `count` tokens from one row of logits, a block of rows per call."""
    device, tokens = logits[0].device, []
    for first in range(0, count, 20_000):
        rows = min(20_000, count - first)
        row_ids = torch.arange(first, first + rows, device=device)
        expanded = [model.expand(rows, -1) for model in logits]
        result = call(
            "mixture_sample", backend, *expanded, 0.3, seed=seed, row_ids=row_ids, step=0, logprobs=(), **options
        )
        tokens.append(result.tokens.cpu().numpy())
    return np.concatenate(tokens)


@every_backend
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9, "temperature": 1.5}], ids=str)
def test_every_token_is_drawn_as_often_as_it_should(backend, options) -> None:
    """A chi-square test over all 4097 tokens (bins of few expected counts pooled) passes."""
    vocabulary, count = (33, INTERPRETED_DRAWS) if interpreted(backend) else (4097, DRAWS[backend])
    logits = logits_pair(1, vocabulary, device_of(backend), scale=1.5)
    mixed = (0.7 * logits[0] + 0.3 * logits[1]).double().cpu()[0] / options.get("temperature", 1.0)
    if "top_p" in options:
        from tests.test_mixture_sample_filters import transformers_support

        mixed = mixed.masked_fill(~transformers_support(mixed[None].float(), top_p=options["top_p"])[0], -torch.inf)
    tokens = draws(backend, logits, count, seed=17, **options)
    counts = np.bincount(tokens, minlength=vocabulary)
    assert_plausible(chi_square_p(counts, mixed.softmax(-1).numpy()), f"{backend} over {vocabulary} tokens")


@pytest.mark.parametrize("head", [0, 100_003, 200_000])
@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_heavy_tail(backend, head) -> None:
    """200,000 tokens at 18 nats below the head receive their 0.3 % of 4 million draws.

    The token is a step function of the uniform. Of the draws whose uniform falls well inside the head's known step,
    only a sample is made and the rest counted as the head; all other draws are made.
    """
    device, vocabulary, count = device_of(backend), 200_001, 4_000_000
    logits = torch.full((1, vocabulary), -18.0, device=device)
    logits[0, head] = 0.0
    row_ids = torch.arange(count, device=device)
    seed, step = torch.tensor(23, device=device), torch.tensor(0, device=device)
    uniforms = nlhf_kernels.row_uniforms(seed, row_ids, step)
    each = 1 / (np.exp(18.0) + vocabulary - 1)
    low, high = head * each, 1 - (vocabulary - 1 - head) * each
    inside = (uniforms > low + 1e-4) & (uniforms < high - 1e-4)
    made = torch.cat([row_ids[inside][:500], row_ids[~inside]])
    tokens = []
    for part in made.split(4096):
        rows = logits.expand(len(part), -1)
        tokens.append(call("mixture_sample", backend, rows, seed=seed, row_ids=part, step=step, logprobs=()).tokens)
    drawn = torch.cat(tokens).cpu()
    assert (drawn[:500] == head).all()
    tail = drawn[drawn != head].numpy()
    probability = (vocabulary - 1) * each
    z = (len(tail) - count * probability) / np.sqrt(count * probability * (1 - probability))
    assert abs(z) < 5
    assert_plausible(proportion_p(len(tail), count, probability), "mass of the tail")
    bins = np.bincount(tail * 100 // vocabulary, minlength=100)
    sizes = np.bincount(np.delete(np.arange(vocabulary), head) * 100 // vocabulary, minlength=100)
    assert_plausible(chi_square_p(bins, sizes / sizes.sum()), "spread over the tail")


@every_backend
def test_streams_and_steps_are_independent(backend) -> None:
    """y and y' of one prompt, and neighbouring steps, are independent in 8 x 8 contingency tables."""
    device = device_of(backend)
    rows = INTERPRETED_DRAWS if interpreted(backend) else 40_000
    logits, row_ids = torch.zeros(rows, 8, device=device), torch.arange(rows, device=device)
    token = lambda step, stream: call(  # noqa: E731
        "mixture_sample", backend, logits, seed=1, row_ids=row_ids, step=step, stream=stream, logprobs=()
    ).tokens.cpu()
    first = token(0, 0)
    for name, other in {"stream": token(0, 1), "step": token(1, 0)}.items():
        width = 2 if interpreted(backend) else 8
        table = torch.bincount(first % width * width + other % width, minlength=width**2).numpy()
        assert_plausible(chi_square_p(table, np.full(width**2, 1 / width**2)), f"independence of {name}")


@every_rival
def test_ties_within_rounding_are_rare_and_true_ties(backend) -> None:
    """The same uniforms give the oracle's tokens, except draws whose uniform lies within rounding of a boundary.

    Stated rate: at most 1 in 2,000 with Gaussian logits over 4097 tokens. Each exception is a tie in float64.
    """
    device = device_of(backend)
    rows = INTERPRETED_DRAWS if interpreted(backend) else 10_000
    policy, reference = (model.expand(rows, -1) for model in logits_pair(1, 4097, device))
    uniforms = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).to(device)
    tokens = call("mixture_sample", backend, policy, reference, 0.3, uniforms=uniforms, logprobs=()).tokens
    oracle = nlhf_kernels.mixture_sample(policy, reference, 0.3, uniforms=uniforms, logprobs=(), backend="torch").tokens
    differ = tokens != oracle
    assert int(differ.sum()) <= max(1, rows // 2000)
    boundary = (0.7 * policy[0].double() + 0.3 * reference[0].double()).softmax(-1).cumsum(-1)
    between = torch.minimum(tokens, oracle)[differ]
    assert (torch.maximum(tokens, oracle)[differ] - between <= 1).all()
    assert ((boundary[between] - uniforms[differ]).abs() <= BOUNDARY).all()
