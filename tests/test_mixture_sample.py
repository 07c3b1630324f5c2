"""mixture_sample: every backend against float64, and the contract on what a row's token depends on."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import nlhf_kernels
from nlhf_kernels.ops.mixture_sample.op import sample_packed
from tests.support.backends import DEVICE, SIMD_LEVELS, call, device_of, every_backend
from tests.support.mixture import assert_right, logits_pair, uniforms_for
from tests.support.poison import poisoned_allocations, surrounded

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPE_PAIRS = [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (BF16, F16)]


def _example(device, dtypes, vocabulary, **options):
    draw = {"seed": torch.tensor(3, device=device), "row_ids": torch.arange(4, device=device)}
    pair = logits_pair(4, vocabulary, device, dtypes)
    return (*pair, 0.3), {**draw, "step": torch.tensor(1, device=device), **options}


EXAMPLES = [
    partial(_example, dtypes=(F32, F32), vocabulary=50),
    partial(_example, dtypes=(BF16, BF16), vocabulary=4097),
    partial(_example, dtypes=(BF16, F32), vocabulary=2100, top_k=20, top_p=0.9, min_p=0.01, temperature=0.8),
]


@every_backend
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 2, 7, 999, 1024, 4097])
def test_draws_match_float64(backend, dtypes, vocabulary) -> None:
    device = device_of(backend)
    policy, reference = (surrounded(model) for model in logits_pair(5, vocabulary, device, dtypes))
    uniforms = uniforms_for(5, device)
    with poisoned_allocations() as handed_out:
        result = call("mixture_sample", backend, policy, reference, 0.3, uniforms=uniforms, temperature=0.8)
    assert handed_out or backend == "torch"
    assert_right(result, policy, reference, 0.3, uniforms, temperature=0.8)


@every_backend
@pytest.mark.parametrize("vocabulary", [32_000, 151_936])
def test_large_vocabularies_match_float64(backend, vocabulary) -> None:
    device = device_of(backend)
    policy, reference = logits_pair(3, vocabulary, device, (BF16, BF16))
    uniforms = uniforms_for(3, device)
    result = call("mixture_sample", backend, policy, reference, 0.6, uniforms=uniforms)
    assert_right(result, policy, reference, 0.6, uniforms)


@pytest.mark.parametrize("simd_level", SIMD_LEVELS, indirect=True)
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 17, 1025, 9001])
def test_simd_levels_match_float64(simd_level, dtypes, vocabulary) -> None:
    policy, reference = (surrounded(model) for model in logits_pair(40, vocabulary, torch.device("cpu"), dtypes))
    uniforms = uniforms_for(40, torch.device("cpu"))
    for filters in ({}, {"top_k": 40, "top_p": 0.9}):
        result = call("mixture_sample", "cpu", policy, reference, 0.3, uniforms=uniforms, **filters)
        assert_right(result, policy, reference, 0.3, uniforms, **filters)


@every_backend
def test_settings_per_row(backend) -> None:
    """One launch serves beta inside, at the ends and outside of [0, 1], greedy rows, and every filter."""
    device = device_of(backend)
    policy, reference = logits_pair(8, 500, device)
    column = lambda *values: torch.tensor(values, device=device)  # noqa: E731
    beta = column(0.0, 1.0, 0.5, -0.5, 1.5, 0.3, 0.3, 0.3)
    options = {
        "temperature": column(1.0, 0.7, 0.0, 1.3, 2.0, 1.0, 0.0, 1.0),
        "top_k": column(0, 5, 0, 1, 600, 50, 3, 0),
        "top_p": column(1.0, 1.0, 0.5, 0.9, 0.8, 1.0, 0.2, 0.05),
        "min_p": column(0.0, 0.0, 0.1, 0.0, 0.05, 1.0, 0.0, 0.0),
    }
    uniforms = uniforms_for(8, device)
    result = call("mixture_sample", backend, policy, reference, beta, uniforms=uniforms, **options)
    assert_right(result, policy, reference, beta, uniforms, **options)
    for i in range(8):
        row, numbers = slice(i, i + 1), {name: values[i].item() for name, values in options.items()}
        alone = call(
            "mixture_sample", backend, policy[row], reference[row], float(beta[i]), uniforms=uniforms[row], **numbers
        )
        assert torch.equal(alone.tokens, result.tokens[row])


@every_backend
def test_one_model_and_four(backend) -> None:
    device = device_of(backend)
    models = logits_pair(6, 333, device, (F32, BF16, F16, F32))
    uniforms = uniforms_for(6, device)
    plain = call("mixture_sample", backend, models[0], uniforms=uniforms)
    assert plain.reference_logprob is None
    assert_right(plain, models[0], None, None, uniforms)
    torch.testing.assert_close(plain.policy_logprob, plain.mixture_logprob, rtol=0, atol=1e-5)

    weights = (1.0, 0.5, -0.7, 2.0)
    result = nlhf_kernels.log_linear_sample(models, weights, uniforms=uniforms, temperature=2.0, backend=backend)
    mixed = sum(weight * model.float() for weight, model in zip(weights, models, strict=True))
    same = call("mixture_sample", backend, mixed, uniforms=uniforms, temperature=2.0)
    assert torch.equal(result.tokens, same.tokens)
    torch.testing.assert_close(result.mixture_logprob, same.mixture_logprob, rtol=0, atol=1e-4)
    for logprob, model in zip(result.logprobs, models, strict=True):
        expected = model.float().log_softmax(-1).gather(-1, result.tokens[:, None]).squeeze(-1)
        torch.testing.assert_close(logprob, expected, rtol=0, atol=1e-4)


@every_backend
def test_a_model_of_weight_zero_is_not_looked_at(backend) -> None:
    """At beta = 0 and 1 the other model's logits are ignored, since 0 * -inf is NaN."""
    device = device_of(backend)
    policy, reference = logits_pair(4, 70, device)
    uniforms = uniforms_for(4, device)
    for poison in (-torch.inf, torch.inf, torch.nan):
        broken = torch.full_like(reference, poison)
        result = call("mixture_sample", backend, policy, broken, 0.0, uniforms=uniforms, logprobs=("policy", "mixture"))
        assert_right(result, policy, None, None, uniforms)
        result = call("mixture_sample", backend, broken, reference, 1.0, uniforms=uniforms, logprobs=("reference",))
        assert result.ok.all()
        assert torch.equal(result.tokens, call("mixture_sample", backend, reference, uniforms=uniforms).tokens)
    holes = reference.clone()
    holes[:, ::2] = -torch.inf
    result = call("mixture_sample", backend, policy, holes, 0.3, uniforms=uniforms)
    assert (result.tokens % 2 == 1).all(), "a token that one model forbids is never drawn"
    free = call("mixture_sample", backend, policy, holes, 0.0, uniforms=uniforms)
    forbidden = free.tokens % 2 == 0
    assert (free.reference_logprob[forbidden] == -torch.inf).all()
    assert free.ok.all(), "-inf is a log-probability"


@every_backend
@pytest.mark.parametrize("fault", ["nan", "inf", "all -inf", "one nan"])
@pytest.mark.parametrize("filters", [{}, {"top_k": 5}], ids=str)
def test_a_faulty_row_is_reported_and_alone(backend, fault, filters) -> None:
    device = device_of(backend)
    policy, reference = logits_pair(5, 1500, device)
    uniforms = uniforms_for(5, device)
    good = call("mixture_sample", backend, policy, reference, 0.4, uniforms=uniforms, **filters)
    broken = policy.clone()
    if fault == "one nan":
        broken[2, 1400] = torch.nan
    elif fault == "inf":
        broken[2, 700] = torch.inf
    else:
        broken[2] = torch.nan if fault == "nan" else -torch.inf
    result = call("mixture_sample", backend, broken, reference, 0.4, uniforms=uniforms, **filters)
    assert result.ok.tolist() == [True, True, False, True, True]
    assert result.tokens[2] == 0
    for after, before in zip(result[1:4], good[1:4], strict=True):
        assert after[2].isnan()
        others = [0, 1, 3, 4]
        assert torch.equal(after[others], before[others])
    assert torch.equal(result.tokens[[0, 1, 3, 4]], good.tokens[[0, 1, 3, 4]])


@every_backend
def test_ends_of_the_uniform(backend) -> None:
    """0, denormals, the largest below 1, and 1 itself give the first and the last token that has probability."""
    device = device_of(backend)
    ends = torch.tensor([0.0, 5e-324, 1e-300, 1 - 2.0**-53, 1.0], dtype=torch.float64, device=device)
    logits = torch.zeros(5, 3001, device=device)
    logits[:, :3] = -torch.inf
    logits[:, -2:] = -torch.inf
    result = call("mixture_sample", backend, logits, uniforms=ends)
    assert result.tokens.tolist() == [3, 3, 3, 2998, 2998]
    assert result.ok.all()


@every_backend
def test_greedy_takes_the_first_of_equal_maxima(backend) -> None:
    device = device_of(backend)
    logits = torch.zeros(3, 5000, device=device)
    logits[0, [17, 4999]] = 2.0
    logits[1, 4998:] = 1.0
    result = call("mixture_sample", backend, logits, uniforms=uniforms_for(3, device), temperature=0.0)
    assert result.tokens.tolist() == [17, 4998, 0]
    assert (result.mixture_logprob == 0).all()


@every_backend
def test_bias_forbids_and_shifts(backend) -> None:
    device = device_of(backend)
    policy, reference = logits_pair(6, 900, device)
    uniforms = uniforms_for(6, device)
    shared = torch.randn(900, device=device)
    shared[100:800] = -torch.inf
    per_row = torch.randn(6, 900, device=device)
    for bias in (shared, per_row, per_row[:, torch.arange(899, -1, -1)].mT.contiguous().mT):
        result = call("mixture_sample", backend, policy, reference, 0.3, uniforms=uniforms, bias=bias, temperature=0.5)
        assert_right(result, policy, reference, 0.3, uniforms, bias=bias, temperature=0.5)


@every_backend
def test_padded_and_strided_logits(backend) -> None:
    """Padded, unaligned and transposed rows, and columns beyond vocab_size, do not change the result."""
    device = device_of(backend)
    policy, reference = logits_pair(4, 1000, device, (F32, BF16))
    uniforms = uniforms_for(4, device)
    expected = call("mixture_sample", backend, policy, reference, 0.3, uniforms=uniforms)
    for padding in (1, 24):
        wide = [torch.full((4, 1000 + padding), torch.nan, device=device, dtype=m.dtype) for m in (policy, reference)]
        for target, model in zip(wide, (policy, reference), strict=True):
            target[:, :1000] = model
        sliced = call("mixture_sample", backend, wide[0][:, :1000], wide[1][:, :1000], 0.3, uniforms=uniforms)
        limited = call("mixture_sample", backend, *wide, 0.3, uniforms=uniforms, vocab_size=1000)
        for result in (sliced, limited):
            assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    turned = call("mixture_sample", backend, policy.mT.contiguous().mT, reference, 0.3, uniforms=uniforms)
    assert torch.equal(turned.tokens, expected.tokens)


@every_backend
def test_only_what_is_asked_for(backend) -> None:
    device = device_of(backend)
    policy, reference = logits_pair(3, 64, device)
    uniforms = uniforms_for(3, device)
    everything = call("mixture_sample", backend, policy, reference, 0.3, uniforms=uniforms)
    for names in ((), ("policy",), ("mixture",), ("reference", "mixture")):
        result = call("mixture_sample", backend, policy, reference, 0.3, uniforms=uniforms, logprobs=names)
        assert torch.equal(result.tokens, everything.tokens)
        for name in ("policy", "reference", "mixture"):
            value = getattr(result, f"{name}_logprob")
            assert (value is None) is (name not in names)
            assert value is None or torch.equal(value, getattr(everything, f"{name}_logprob"))


@every_backend
def test_packed_settings_sample_the_same(backend) -> None:
    """The rollout engine's entry point (weights in the settings, log-probabilities by bit mask) gives equal results."""
    device = device_of(backend)
    policy, reference = logits_pair(5, 700, device)
    beta = torch.linspace(0, 1, 5, device=device)
    draw = {"seed": torch.tensor(5, device=device), "step": torch.tensor(9, device=device), "stream": 1}
    draw |= {"row_ids": torch.arange(5, device=device)}
    expected = call("mixture_sample", backend, policy, reference, beta, top_p=0.9, **draw)
    settings = nlhf_kernels.mixture_settings([1 - beta, beta], top_p=0.9, device=device)
    packed = sample_packed([policy, reference], settings, logprob_mask=0b111, backend=backend, **draw)
    assert torch.equal(packed.tokens, expected.tokens) and torch.equal(packed.ok, expected.ok)
    assert all(torch.equal(one, other) for one, other in zip(packed.logprobs, expected[1:4], strict=True))
    named = nlhf_kernels.log_linear_sample([policy, reference], settings=settings, backend=backend, **draw)
    assert torch.equal(named.tokens, expected.tokens)
    one = sample_packed([policy, reference], settings, logprob_mask=0b100, backend=backend, **draw)
    assert torch.equal(one.logprobs[2], expected.mixture_logprob)


@every_backend
def test_no_rows(backend) -> None:
    device = device_of(backend)
    empty = torch.empty(0, 30, device=device)
    result = call("mixture_sample", backend, empty, empty, 0.5, uniforms=torch.empty(0, device=device).double())
    assert [len(value) for value in result] == [0] * 5


@every_backend
def test_the_draw_is_the_row_uniform_and_depends_on_nothing_else(backend) -> None:
    """Equal (seed, row id, step, stream) and inputs give the same token in any batch, order and position."""
    device = device_of(backend)
    policy, reference = logits_pair(12, 2000, device)
    draw = {"seed": torch.tensor(5, device=device), "step": torch.tensor(9, device=device), "stream": 1}
    row_ids = torch.arange(12, device=device) * 2**33
    together = call("mixture_sample", backend, policy, reference, 0.3, row_ids=row_ids, **draw)
    uniforms = nlhf_kernels.row_uniforms(draw["seed"], row_ids, draw["step"], stream=1)
    assert torch.equal(
        together.tokens, call("mixture_sample", backend, policy, reference, 0.3, uniforms=uniforms).tokens
    )
    order = torch.randperm(12).to(device)
    shuffled = call("mixture_sample", backend, policy[order], reference[order], 0.3, row_ids=row_ids[order], **draw)
    assert torch.equal(shuffled.tokens, together.tokens[order])
    alone = call("mixture_sample", backend, policy[7:8], reference[7:8], 0.3, row_ids=row_ids[7:8], **draw)
    assert torch.equal(alone.tokens, together.tokens[7:8])
    as_numbers = call("mixture_sample", backend, policy, reference, 0.3, row_ids=row_ids, seed=5, step=9, stream=1)
    assert torch.equal(as_numbers.tokens, together.tokens)
    for change in ({"seed": 6}, {"step": 10}, {"stream": 0}):
        other_draw = call("mixture_sample", backend, policy, reference, 0.3, row_ids=row_ids, **{**draw, **change})
        assert not torch.equal(other_draw.tokens, together.tokens)


@pytest.mark.parametrize("name", ["seed", "step"])
@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 2**70])
def test_numbers_beyond_int64_are_named(name, number) -> None:
    draw = {"seed": 5, "step": 9, "row_ids": torch.arange(2)}
    with pytest.raises(ValueError, match=f"mixture_sample: {name}: expected an integer in .*; got {number}"):
        nlhf_kernels.mixture_sample(torch.zeros(2, 5), torch.zeros(2, 5), 0.3, **{**draw, name: number})


@every_backend
def test_a_common_offset_changes_nothing(backend) -> None:
    """Tokens are invariant under an offset, even a large one; whole numbers keep all logits exact in float32."""
    device = device_of(backend)
    policy = torch.randint(-8, 8, (4, 700), device=device).float()
    reference = torch.randint(-8, 8, (4, 700), device=device).float()
    uniforms = uniforms_for(4, device)
    plain = call("mixture_sample", backend, policy, reference, 0.5, uniforms=uniforms)
    for offset in (1e4, -1e4):
        moved = call("mixture_sample", backend, policy + offset, reference + offset, 0.5, uniforms=uniforms)
        assert torch.equal(moved.tokens, plain.tokens)
        for after, before in zip(moved[1:4], plain[1:4], strict=True):
            torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


def test_threads_do_not_matter() -> None:
    before = torch.get_num_threads()
    device = torch.device("cpu")
    policy, reference = logits_pair(3, 70_001, device)
    uniforms = uniforms_for(3, device)
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(call("mixture_sample", "cpu", policy, reference, 0.3, uniforms=uniforms, top_p=0.95))
            results.append(
                call("mixture_sample", "cpu", policy[:1], reference[:1], 0.3, uniforms=uniforms[:1], top_p=0.95)
            )
    finally:
        torch.set_num_threads(before)
    for first, later in zip(results[:2] * 2, results[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, later, strict=True))


@every_backend
def test_offsets_past_two_to_the_31(backend) -> None:
    """Two rows 2^31 elements apart are addressed correctly; the memory between them is never touched."""
    if backend == "triton" and DEVICE.type == "cpu":
        pytest.skip("the interpreter copies the whole storage")
    device = device_of(backend)
    storage = torch.empty(2**31 + 1000, dtype=BF16, device=device)
    far = storage.as_strided((2, 900), (2**31, 1))
    near = logits_pair(2, 900, device, (BF16,))[0]
    far.copy_(near)
    uniforms = uniforms_for(2, device)
    result = call("mixture_sample", backend, far, uniforms=uniforms)
    assert torch.equal(result.tokens, call("mixture_sample", backend, near, uniforms=uniforms).tokens)
