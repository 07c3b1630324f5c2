"""Filters of mixture_sample: transformers' support, no draws outside of it, bounded time on the worst inputs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import nlhf_kernels
from nlhf_kernels.core import tuning
from nlhf_kernels.ops.mixture_sample import oracle
from nlhf_kernels.ops.mixture_sample.layout import MixtureSampleInputs
from nlhf_kernels.ops.mixture_sample.settings import mixture_settings
from tests.support.backends import SIMD_LEVELS, call, device_of, every_backend
from tests.support.mixture import assert_right, logits_pair, uniforms_for

FILTERS = [
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 10**6},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"top_p": 0.999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.7},
    {"top_k": 40, "top_p": 0.95, "min_p": 0.02},
    {"top_p": 0.8, "min_p": 0.3},
]


def transformers_support(scores: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> torch.Tensor:
    """Return the support left by transformers' warpers, in the order of generate()."""
    from transformers.generation import logits_process as warpers

    if top_k:
        scores = warpers.TopKLogitsWarper(min(top_k, scores.shape[-1]))(None, scores)
    if top_p < 1:
        scores = warpers.TopPLogitsWarper(top_p)(None, scores)
    if min_p > 0:
        scores = warpers.MinPLogitsWarper(min_p)(None, scores)
    return scores > -torch.inf


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_oracle_keeps_what_transformers_keeps(filters) -> None:
    scores = torch.cat([logits_pair(20, 5000, "cpu", scale=scale)[0] for scale in (0.1, 1.0, 4.0)])
    packed = mixture_settings([1.0], device=torch.device("cpu"), **filters).packed
    assert torch.equal(oracle.support(scores, packed), transformers_support(scores, **filters))


@every_backend
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filtered_draws_match_float64(backend, filters) -> None:
    """Filtered draws match float64; the mixture's log-probability reveals any token too many or too few."""
    device = device_of(backend)
    policy, reference = logits_pair(6, 3000, device)
    uniforms = uniforms_for(6, device)
    result = call("mixture_sample", backend, policy, reference, 0.4, uniforms=uniforms, temperature=0.9, **filters)
    assert_right(result, policy, reference, 0.4, uniforms, temperature=0.9, **filters)


@pytest.mark.parametrize("simd_level", SIMD_LEVELS, indirect=True)
@pytest.mark.parametrize("scale", [0.05, 1.0, 10.0])
def test_filtered_draws_of_every_shape_match_float64(simd_level, scale) -> None:
    for vocabulary, filters in itertools.product((1, 3, 16, 130, 20_000), FILTERS):
        policy, reference = logits_pair(16, vocabulary, "cpu", scale=scale)
        uniforms = uniforms_for(16, "cpu")
        result = call("mixture_sample", "cpu", policy, reference, 0.3, uniforms=uniforms, **filters)
        assert_right(result, policy, reference, 0.3, uniforms, **filters)


@every_backend
def test_ties_at_the_boundary_are_all_kept(backend) -> None:
    """Top-3 with four tokens tied for third, and top-p whose boundary splits equal tokens, keep all ties."""
    device = device_of(backend)
    rows = 40 if backend == "triton" and device.type == "cpu" else 400  # interpreted
    logits = torch.full((rows, 90), -9.0, device=device)
    logits[:, 11] = 2.0
    logits[:, 40] = 1.5
    logits[:, [5, 50, 60, 89]] = 1.0
    uniforms = torch.linspace(0.001, 0.999, rows, dtype=torch.float64).to(device)
    for filters in ({"top_k": 3}, {"top_p": 0.75}):
        tokens = call("mixture_sample", backend, logits, uniforms=uniforms, **filters).tokens
        assert set(tokens.tolist()) == {5, 11, 40, 50, 60, 89}
    tokens = call("mixture_sample", backend, logits, uniforms=uniforms, top_k=2).tokens
    assert set(tokens.tolist()) == {11, 40}


WORST = {
    "all equal": lambda v: torch.zeros(v),
    "all equal, negative": lambda v: torch.full((v,), -3.25),
    "two adjacent floats": lambda v: torch.where(torch.arange(v) % 2 == 0, 1.0, math.nextafter(1.0, 2.0)).float(),
    "adjacent floats all the way": lambda v: (torch.arange(v, dtype=torch.int32) + 0x3F800000).view(torch.float32),
    "subnormals": lambda v: torch.arange(v, dtype=torch.int32).view(torch.float32),
    "signed zeros": lambda v: torch.where(torch.arange(v) % 2 == 0, 0.0, -0.0),
    "one above -inf": lambda v: torch.full((v,), -torch.inf).index_fill(0, torch.tensor(v // 2), 0.0),
    "mostly -inf": lambda v: torch.where(torch.arange(v) % 97 == 0, torch.arange(v) / v, -torch.inf),
    "huge spread": lambda v: torch.linspace(-1.5e38, 1.5e38, v),
    "descending": lambda v: -torch.arange(v) / 7.0,
}


@every_backend
@pytest.mark.parametrize("name", WORST)
@pytest.mark.parametrize("filters", [{"top_k": 7}, {"top_p": 0.5}, {"min_p": 0.5}, {"top_k": 9, "top_p": 0.3}], ids=str)
def test_the_worst_inputs_end_and_are_right(backend, name, filters) -> None:
    device = device_of(backend)
    logits = WORST[name](2500).float().expand(6, -1).contiguous().to(device)
    uniforms = torch.tensor([0.0, 0.1, 0.5, 0.77, 0.999, 1.0], dtype=torch.float64, device=device)
    result = call("mixture_sample", backend, logits, uniforms=uniforms, **filters)
    assert_right(result, logits, None, None, uniforms, **filters)


@every_backend
def test_a_filtered_token_is_never_drawn(backend) -> None:
    device = device_of(backend)
    rows = 30 if backend == "triton" and device.type == "cpu" else 300  # interpreted
    policy = logits_pair(1, 800, device)[0].expand(rows, -1)
    uniforms = torch.linspace(0, 1, rows, dtype=torch.float64).to(device)
    for filters in ({"top_k": 3}, {"top_p": 0.3}, {"min_p": 0.5}):
        packed = mixture_settings([1.0], device=device, **filters).packed
        allowed = set(oracle.support(policy[:1], packed)[0].nonzero().flatten().tolist())
        tokens = call("mixture_sample", backend, policy, uniforms=uniforms, **filters).tokens
        assert set(tokens.tolist()) <= allowed
        assert int(policy[0].argmax()) in set(tokens.tolist())


@pytest.mark.parametrize("filters", [{"top_k": 9}, {"top_p": 0.6}, {"top_k": 40, "top_p": 0.9, "min_p": 0.01}], ids=str)
@pytest.mark.parametrize(("bins", "listed"), [(64, 1024), (64, 4), (4, 16)])
def test_triton_finds_thresholds_in_few_bins_and_short_lists(bins, listed, filters) -> None:
    """Lists too short for the candidates, several chunks and tiles: the row itself is searched. No result depends on
    the numbers of a plan."""
    device = device_of("triton")
    policy, reference = logits_pair(2, 1200, device)
    uniforms = uniforms_for(2, device)
    arguments = {"uniforms": uniforms, "temperature": 0.7, **filters}
    expected = call("mixture_sample", "triton", policy, reference, 0.4, **arguments)
    tunable = tuning.Tunable.instances["mixture_sample", "triton"]
    plan = tunable.make((256, 4, 4, 2, bins, listed))
    with tuning.use_plan(tunable, plan):
        result = nlhf_kernels.mixture_sample(policy, reference, 0.4, **arguments, backend="triton")
    assert_right(result, policy, reference, 0.4, uniforms, temperature=0.7, **filters)
    assert torch.equal(result.tokens, expected.tokens)


def test_triton_filters_with_four_launches_and_little_memory() -> None:
    pytest.importorskip("triton")
    from nlhf_kernels.ops.mixture_sample import triton_kernels

    launches, scratch = triton_kernels.launches_of(_filtered_inputs(rows=3, vocabulary=151_936))
    assert len(launches) == 4
    assert scratch.size < 3 * 151_936, "less than a byte a logit"
    launches, scratch = triton_kernels.launches_of(_filtered_inputs(3, 151_936)._replace(filtered=False))
    assert len(launches) == 2
    assert scratch.size < 3 * 151_936 // 10


def _filtered_inputs(rows: int, vocabulary: int) -> MixtureSampleInputs:
    logits = torch.empty(rows, vocabulary, dtype=torch.bfloat16, device="meta")
    settings = torch.empty(1, 6, dtype=torch.float32, device="meta")
    uniforms = torch.empty(rows, dtype=torch.float64, device="meta")
    return MixtureSampleInputs([logits, logits], settings, True, None, uniforms, None, None, None, 0, 7, "")


BAD = [
    ({"beta": math.nan}, ValueError, "beta: expected a finite number; got nan"),
    ({"beta": None}, ValueError, "beta: expected with reference_logits and not without; got None"),
    ({"beta": "0.3"}, TypeError, "beta: expected a number or a tensor"),
    ({"reference_logits": None}, ValueError, "beta: expected with reference_logits and not without; got 0.3"),
    (
        {"reference_logits": torch.zeros(3, 51)},
        ValueError,
        r"expected shape \(rows, vocabulary\) with rows=3, vocabulary=50",
    ),
    (
        {"reference_logits": torch.zeros(3, 50).double()},
        TypeError,
        "reference_logits: expected dtype float32 or bfloat16",
    ),
    ({"reference_logits": torch.zeros(3, 50, device="meta")}, ValueError, "reference_logits: expected a tensor on cpu"),
    (
        {"policy_logits": torch.zeros(50)},
        ValueError,
        r"policy_logits: expected shape \(rows, vocabulary\); got \(50,\)",
    ),
    ({"temperature": -1.0}, ValueError, r"temperature: expected a finite number in \[0.0, inf\); got -1.0"),
    ({"temperature": math.inf}, ValueError, "temperature: expected a finite number"),
    ({"temperature": torch.ones(4)}, ValueError, "temperature: expected shape"),
    ({"top_p": 0.0}, ValueError, r"top_p: expected a finite number in \(0.0, 1.0\]; got 0.0"),
    ({"top_p": 1.1}, ValueError, "top_p: expected a finite number"),
    ({"top_k": -1}, ValueError, "top_k: expected a finite number"),
    ({"top_k": 2.5}, ValueError, "top_k: expected a whole number, 0 for no filter; got 2.5"),
    ({"min_p": 1.5}, ValueError, "min_p: expected a finite number"),
    ({"seed": torch.tensor(1.0)}, TypeError, "seed: expected dtype int64; got float32"),
    ({"seed": None}, ValueError, "seed, row_ids, step: expected all three, or uniforms"),
    ({"row_ids": torch.arange(4)}, ValueError, r"row_ids: expected shape \(rows\) with rows=3; got \(4,\)"),
    ({"step": torch.zeros(2, dtype=torch.int64)}, ValueError, "step: expected shape"),
    ({"stream": 300}, ValueError, "stream: expected an integer"),
    ({"stream": [0]}, TypeError, "stream: expected an integer; got list"),
    ({"stream": False}, TypeError, "stream: expected an integer; got bool"),
    ({"uniforms": torch.zeros(3)}, TypeError, "uniforms: expected dtype float64"),
    ({"bias": torch.zeros(49)}, ValueError, "bias: expected shape"),
    ({"bias": torch.zeros(50, dtype=torch.bool)}, TypeError, "bias: expected dtype float32; got bool"),
    ({"vocab_size": 51}, ValueError, r"vocab_size: expected an integer in \[1, 50\]; got 51"),
    ({"logprobs": ("opponent",)}, ValueError, "logprobs: expected any of policy, reference, mixture; got 'opponent'"),
    ({"backend": "fast"}, ValueError, "backend: expected one of"),
    ({"settings": mixture_settings([1.0], device=torch.device("cpu"))}, ValueError, "settings: expected packed for"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_is_named(change, error, message) -> None:
    good = {"policy_logits": torch.zeros(3, 50), "reference_logits": torch.zeros(3, 50), "beta": 0.3}
    good |= {"seed": torch.tensor(1), "row_ids": torch.arange(3), "step": torch.tensor(0)}
    for _ in range(2):  # known by then, which vouches for no other call
        assert nlhf_kernels.mixture_sample(**good).ok.all()
    with pytest.raises(error, match=message):
        nlhf_kernels.mixture_sample(**{**good, **change})


def test_log_linear_bad_input_is_named() -> None:
    logits, draw = [torch.zeros(2, 5)] * 2, {"uniforms": torch.zeros(2, dtype=torch.float64)}
    for models, weights, message in (
        ([], [], "logits: expected 1 to 4 models; got 0"),
        (logits * 3, [1.0] * 6, "logits: expected 1 to 4 models; got 6"),
        (logits, [1.0], "weights: expected one per model, 2; got 1"),
        (logits, [1.0, math.inf], r"weights\[1\]: expected a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            nlhf_kernels.log_linear_sample(models, weights, **draw)
    with pytest.raises(ValueError, match="logprobs: expected any of 0, 1, mixture; got 2"):
        nlhf_kernels.log_linear_sample(logits, [1.0, 1.0], logprobs=(2,), **draw)
    with pytest.raises(ValueError, match="weights: expected one per model, 2; got None"):
        nlhf_kernels.log_linear_sample(logits, **draw)
