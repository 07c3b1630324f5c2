"""mixture_sample's CUDA sources on the CPU: the shared test bodies, run with the emulated kernels behind backend "cpu".

What is tested is the logic (barriers, reductions over blocks, indices, edges), not memory ordering and not speed.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nlhf_kernels
from nlhf_kernels.core import capabilities, tuning
from nlhf_kernels.core import native as core_native
from nlhf_kernels.core.prepared import addresses_of
from nlhf_kernels.ops.mixture_sample import native, oracle
from nlhf_kernels.ops.mixture_sample.layout import MixtureSampleInputs, empty_sample
from nlhf_kernels.ops.mixture_sample.op import OP
from nlhf_kernels.ops.mixture_sample.settings import mixture_settings
from tests import test_mixture_sample as shared
from tests import test_mixture_sample_filters as filters
from tests.emulation.fixture import CRAMPED, ROOMY
from tests.support.mixture import assert_right, logits_pair, uniforms_for

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def _emulated_cuda(emulation, monkeypatch) -> Iterator[None]:
    real = capabilities.native
    monkeypatch.setattr(native.capabilities, "native", lambda name: emulation.module if name == "_cuda" else real(name))
    monkeypatch.setattr(capabilities, "native_missing", lambda name: "")
    monkeypatch.setattr(native, "cuda_stream", lambda device: 0)
    monkeypatch.setattr(native, "on_device", lambda device: contextlib.nullcontext())
    monkeypatch.setitem(OP.backend("cpu").__dict__, "prepare", native.prepare_cuda)
    forget_plans()
    yield
    forget_plans()


def forget_plans() -> None:
    """Prepare calls anew, and ask the emulated device for its default plans again, after another was chosen."""
    tuning.forget_plans()
    native._default_plan.cache_clear()


@pytest.mark.parametrize("dtypes", shared.DTYPE_PAIRS, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 2, 7, 999, 1024, 4097])
def test_draws_match_float64(dtypes, vocabulary) -> None:
    shared.test_draws_match_float64("cpu", dtypes, vocabulary)


@pytest.mark.parametrize("device", [ROOMY, CRAMPED])
@pytest.mark.parametrize("seed", [0, 7])
def test_large_vocabulary_in_any_order_of_blocks(emulation, device, seed) -> None:
    emulation.library.emulation_set_device(device)
    emulation.library.emulation_set_seed(ctypes.c_uint64(seed))
    shared.test_large_vocabularies_match_float64("cpu", 32_000)


BODIES = [
    shared.test_settings_per_row,
    shared.test_one_model_and_four,
    shared.test_a_model_of_weight_zero_is_not_looked_at,
    shared.test_ends_of_the_uniform,
    shared.test_greedy_takes_the_first_of_equal_maxima,
    shared.test_bias_forbids_and_shifts,
    shared.test_padded_and_strided_logits,
    shared.test_only_what_is_asked_for,
    shared.test_no_rows,
    shared.test_the_draw_is_the_row_uniform_and_depends_on_nothing_else,
    shared.test_a_common_offset_changes_nothing,
    shared.test_offsets_past_two_to_the_31,
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_contract(body) -> None:
    body("cpu")


@pytest.mark.parametrize("fault", ["nan", "inf", "all -inf", "one nan"])
@pytest.mark.parametrize("options", [{}, {"top_k": 5}], ids=str)
def test_a_faulty_row_is_reported_and_alone(fault, options) -> None:
    shared.test_a_faulty_row_is_reported_and_alone("cpu", fault, options)


@pytest.mark.parametrize("options", filters.FILTERS, ids=str)
def test_filtered_draws_match_float64(options) -> None:
    filters.test_filtered_draws_match_float64("cpu", options)


@pytest.mark.parametrize("name", filters.WORST)
@pytest.mark.parametrize("options", [{"top_k": 7}, {"top_p": 0.5}, {"top_k": 9, "top_p": 0.3}], ids=str)
def test_the_worst_inputs_end_and_are_right(name, options) -> None:
    filters.test_the_worst_inputs_end_and_are_right("cpu", name, options)


def test_it_is_the_emulated_kernel_that_runs(monkeypatch) -> None:
    def refuse(*arguments):
        raise ZeroDivisionError

    monkeypatch.setitem(OP.backend("cpu").__dict__, "prepare", refuse)
    with pytest.raises(ZeroDivisionError):
        shared.test_ends_of_the_uniform("cpu")


def sample(logits, uniforms, **options):
    policy, reference = logits if len(logits) == 2 else (logits[0], None)
    beta = None if reference is None else 0.3
    return nlhf_kernels.mixture_sample(policy, reference, beta, uniforms=uniforms, backend="cpu", **options)


@pytest.mark.parametrize("options", [{}, {"top_k": 30}, {"top_p": 0.8, "temperature": 1.4}], ids=str)
def test_the_grid_does_not_matter(emulation, options) -> None:
    """Tokens are equal for 1 or 132 multiprocessors and any order of blocks and warps; equal grids give equal bits."""
    logits, uniforms = logits_pair(3, 9001, "cpu", (BF16, BF16)), uniforms_for(3, "cpu")
    expected = None
    for device in (ROOMY, CRAMPED):
        emulation.library.emulation_set_device(device)
        forget_plans()
        results = []
        for seed in (0, 1, 2):
            emulation.library.emulation_set_seed(ctypes.c_uint64(seed))
            results.append(sample(logits, uniforms, **options))
        assert all(torch.equal(a, b) for later in results[1:] for a, b in zip(later, results[0], strict=True))
        assert expected is None or torch.equal(results[0].tokens, expected)
        expected = results[0].tokens


@pytest.mark.parametrize("device", [ROOMY, CRAMPED])
@pytest.mark.parametrize("dtypes", [(F32,), (BF16, BF16), (F32, F16)], ids=str)
@pytest.mark.parametrize("options", [{}, {"top_k": 9, "min_p": 0.01}], ids=str)
def test_the_workspace_needs_no_zeros_and_suffices(emulation, device, dtypes, options) -> None:
    emulation.library.emulation_set_device(device)
    for rows, vocabulary in [(1, 1), (3, 513), (2, 5000)]:
        logits, uniforms = logits_pair(rows, vocabulary, "cpu", dtypes), uniforms_for(rows, "cpu")
        packed, filtered = mixture_settings([1.0, 0.5][: len(logits)], device=torch.device("cpu"), **options)
        size = emulation.module.mixture_sample_workspace(rows, vocabulary, len(logits), filtered)
        results = []
        for poison in (0, 255):
            workspace = torch.full((size + 256,), poison, dtype=torch.uint8)
            inputs = MixtureSampleInputs(
                logits, packed, filtered, None, uniforms, None, None, None, 0, (2 << len(logits)) - 1, "cuda"
            )
            outputs = empty_sample(inputs)
            arguments = native.binding_arguments(inputs, addresses_of(inputs), [x.data_ptr() for x in outputs])
            plan = emulation.module.mixture_sample_plan(rows, vocabulary)
            emulation.module.mixture_sample(*arguments, *plan, workspace.data_ptr(), 0, 0)
            assert (workspace[size:] == poison).all()
            results.append(outputs)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert results[0][2].all()


@pytest.mark.parametrize("options", [{"top_k": 50}, {"top_p": 0.9}, {"top_k": 9000, "top_p": 0.5}], ids=str)
@pytest.mark.parametrize("scale", [0.0, 0.002, 0.3])
def test_more_candidates_than_there_is_room_for(emulation, options, scale) -> None:
    """More than the 8192 candidates that fit: logits this close share a few bins of the first histogram."""
    emulation.library.emulation_set_device(CRAMPED)
    logits, uniforms = logits_pair(2, 20_000, "cpu", scale=scale), uniforms_for(2, "cpu")
    assert_right(sample(logits, uniforms, **options), *logits, 0.3, uniforms, **options)


@pytest.mark.parametrize("candidates", [255, 256, 257])
@pytest.mark.parametrize("options", [{"top_k": 200}, {"top_p": 0.7}, {"top_k": 90, "top_p": 0.5}], ids=str)
def test_few_candidates_are_ranked_and_more_are_searched(candidates, options) -> None:
    """Up to a candidate a thread, each is compared with all others; the distances of these share a bin."""
    logits = torch.linspace(0, 0.003, candidates).expand(3, -1).contiguous()
    logits[1] = logits[1].flip(0) // 2e-5 * 2e-5  # ties
    logits[2] = torch.where(torch.arange(candidates) % 3 == 0, -math.inf, logits[2])
    uniforms = torch.tensor([0.02, 0.5, 0.97], dtype=torch.float64)
    assert_right(sample([logits], uniforms, **options), logits, None, None, uniforms, **options)


@pytest.mark.parametrize("head", [0, 100_003, 200_000])
@pytest.mark.parametrize("options", [{}, {"top_p": 1 - 1e-6}], ids=str)
def test_heavy_tail(emulation, head, options) -> None:
    """With 200,000 tokens 18 nats below the head, which a plain float32 sum would lose, the boundaries are right to a
    thousandth of the tail's mass."""
    emulation.library.emulation_set_device(CRAMPED)
    logits = torch.full((1, 200_001), -18.0)
    logits[0, head] = 0.0
    upper = logits[0].double().softmax(-1).cumsum(-1)
    before, through = float(upper[head] - math.exp(0) / (1 + 2e5 * math.exp(-18))), float(upper[head])
    uniforms = torch.tensor([before / 3, before * 0.999, 0.5, through + (1 - through) / 3, 1 - (1 - through) / 1000])
    uniforms = uniforms.double().clamp(0, 1)
    result = sample([logits.expand(5, -1)], uniforms, logprobs=(), **options)
    expected = torch.searchsorted(upper, uniforms, right=True).clamp(max=200_000)
    assert (upper[result.tokens] - upper[expected]).abs().max() < 1e-3 * 2e5 * math.exp(-18)
    assert result.tokens[2] == head


@pytest.mark.parametrize("options", [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.2}], ids=str)
def test_finite_masks(options) -> None:
    """Tiles and whole rows masked with the dtype's lowest number give no NaN."""
    lowest = torch.finfo(F32).min
    logits = logits_pair(3, 5000, "cpu", (F32,))
    logits[0][0, 900:] = lowest
    logits[0][1, :4990] = lowest
    logits[0][2] = lowest
    uniforms = uniforms_for(3, "cpu")
    assert_right(sample(logits, uniforms, **options), logits[0], None, None, uniforms, **options)


def test_candidates_in_reach_of_a_filter_are_those_of_the_oracle() -> None:
    """The kept tokens equal the oracle's where mixed bfloat16 logits tie with the threshold under some roundings."""
    logits = logits_pair(40, 3000, "cpu", (BF16, BF16), scale=1.0)
    options = {"top_k": 25, "temperature": 0.7}
    packed = mixture_settings([0.7, 0.3], device=torch.device("cpu"), **options).packed
    scaled = oracle.mixed_logits([model.float() for model in logits], packed[:, 4:], None) / packed[:, :1]
    keep = oracle.support(scaled, packed)
    expected = torch.where(keep, scaled.double(), -torch.inf).logsumexp(-1)
    result = sample(logits, uniforms_for(40, "cpu"), logprobs=("mixture",), **options)
    total = scaled.gather(-1, result.tokens[:, None])[:, 0].double() - result.mixture_logprob.double()
    torch.testing.assert_close(total, expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("options", [{}, {"top_k": 50, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("device", [ROOMY, CRAMPED])
def test_counters_serve_one_call_after_the_other(emulation, monkeypatch, options, device) -> None:
    """Counters are zeroed once, and every call resets them, whatever its number of blocks and its faulty rows."""
    emulation.library.emulation_set_device(device)
    counters = core_native.Counters()
    monkeypatch.setattr(native, "_counters", counters)
    for rows, vocabulary in ((3, 9001), (1, 100), (3, 9001), (5, 5000)):
        logits, uniforms = logits_pair(rows, vocabulary, "cpu"), uniforms_for(rows, "cpu")
        logits[0][0, 7] = math.nan
        result = sample(logits, uniforms, **options)
        assert not result.ok[0]
        good = [model[1:] for model in logits]
        assert_right(sample(good, uniforms[1:], **options), *good, 0.3, uniforms[1:], **options)
        assert not any(bool(values.any()) for values in counters._by_stream.values())


def test_captured_calls_have_counters_of_their_own(monkeypatch) -> None:
    here, capturing = torch.device("cpu"), [True]
    monkeypatch.setattr(core_native, "is_capturing", lambda device: capturing[0])
    counters = core_native.Counters()
    assert counters.address(here, 1, 64) == 0, "no reserve yet: the call zeroes its own"
    capturing[0] = False
    eager = counters.address(here, 1, 64)
    assert counters.address(here, 1, 64) == eager != counters.address(here, 2, 64)
    assert counters.address(here, 1, 2**16) != eager, "more rows, more counters"
    capturing[0] = True
    first, second = counters.address(here, 1, 64), counters.address(here, 1, 64)
    assert second == first + 64 and first != eager
    assert counters.address(here, 1, counters.RESERVE) == 0, "beyond the reserve"


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("vocabulary", [515, 520, 1031, 2049])
def test_rows_that_begin_anywhere_and_end_anywhere(dtype, vocabulary) -> None:
    """Rows at every offset within 16 bytes, loaded as shifted aligned blocks, give the same sums to the bit."""
    policy, reference = logits_pair(1, vocabulary, "cpu", (dtype, dtype))
    uniforms = uniforms_for(1, "cpu")
    expected = sample((policy, reference), uniforms)
    assert_right(expected, policy, reference, 0.3, uniforms)
    for offset in range(1, 16 // dtype.itemsize):
        shifted_logits = []
        for model in (policy, reference):
            room = torch.full((1, vocabulary + 32), math.nan, dtype=dtype)
            room[:, offset : offset + vocabulary] = model
            shifted_logits.append(room[:, offset : offset + vocabulary])
        result = sample(shifted_logits, uniforms)
        for after, before in zip(result, expected, strict=True):
            assert torch.equal(after, before), offset


def test_too_long_a_row_is_an_error(emulation) -> None:
    models = ((8, 0, 2**31),)  # 8: an address that is not read
    with pytest.raises(RuntimeError, match=r"mixture_sample: CUDA error 1 \(invalid argument\)"):
        call = (models, 8, 0, False, 0, 0, 8, 0, 0, 0, 0, 0, 0, 1, 2**31, 0, 8, 8, 8)
        emulation.module.mixture_sample(*call, 1, 1, 8, 1, 1, 0, 0, 0)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("device", [ROOMY, CRAMPED])
def test_the_floor_reads_every_logit(emulation, dtype, device) -> None:
    emulation.library.emulation_set_device(device)
    for rows, vocabulary in [(1, 1), (3, 9001), (2, 40_000)]:
        logits = logits_pair(rows, vocabulary, "cpu", (dtype, dtype))
        for row in range(rows):
            logits[0][row, -1 - row % vocabulary] = 100.0 + row
        maxima = native.mixture_sample_floor(*logits)
        expected = torch.stack([model.float().amax(-1) for model in logits], 1)
        assert torch.equal(maxima.amax(-1), expected)


def test_the_floor_launches_nothing_but_its_kernel(emulation) -> None:
    """Anything else between the events would raise what the sampler is compared with."""
    launched = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            launched.append(function.overloadpacket.__name__)
            return function(*arguments, **(options or {}))

    logits = logits_pair(2, 5000, "cpu", (torch.bfloat16, torch.bfloat16))
    with Watch():
        native.mixture_sample_floor(*logits)
    assert set(launched) <= {"empty", "slice", "view"}


PLANS = [native.Plan(1, 1), native.Plan(1, 64), native.Plan(2, 3), native.Plan(4, 1), native.Plan(3, 8)]
PLANS += [native.Plan(1, 2, 7), native.Plan(4, 2, 6), native.Plan(2, 2, 8, 2, 2), native.Plan(4, 3, 6, 2)]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("options", [{}, {"top_k": 30}, {"top_p": 0.8}], ids=str)
def test_every_plan_is_right(plan, options) -> None:
    logits, uniforms = logits_pair(3, 9001, "cpu", (BF16, BF16)), uniforms_for(3, "cpu")
    with tuning.use_plan(native._TUNABLE, plan):
        assert_right(sample(logits, uniforms, **options), *logits, 0.3, uniforms, **options)


def test_a_row_of_more_blocks_than_a_cluster_is_an_error() -> None:
    logits, uniforms = logits_pair(2, 9001, "cpu", (BF16, BF16)), uniforms_for(2, "cpu")
    with (
        tuning.use_plan(native._TUNABLE, native.Plan(1, 2, 8, 2)),  # nine blocks
        pytest.raises(RuntimeError, match=r"mixture_sample: CUDA error 1 \(invalid argument\)"),
    ):
        sample(logits, uniforms)


FMA = [native.Plan(1, 8, ex2) for ex2 in (7, 6)]


@pytest.mark.parametrize("plan", FMA, ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_exponentials_on_fma_units_are_as_accurate(plan, dtype) -> None:
    """Elements that take the polynomial hold nearly all mass of some rows, or NaN, infinities and masks."""
    logits, uniforms = logits_pair(24, 1031, "cpu", (dtype, dtype)), uniforms_for(24, "cpu")
    for row in range(8):
        logits[0][row, row::8] += 20.0  # one position of every eight holds the mass
    logits[0][8:16, ::3] = -math.inf
    logits[1][16:20] = torch.finfo(dtype).min
    logits[0][16:18] = torch.finfo(dtype).min
    with tuning.use_plan(native._TUNABLE, plan):
        result = sample(logits, uniforms)
        assert_right(result, *logits, 0.3, uniforms)
        for fault in (math.nan, math.inf):
            for column in (0, 6, 7, 1023, 1030):
                broken = [logits[0][:2].clone(), logits[1][:2]]
                broken[0][1, column] = fault
                ok = sample(broken, uniforms[:2]).ok
                assert ok.tolist() == [True, False], (fault, column)
    torch.testing.assert_close(result.mixture_logprob, sample(logits, uniforms).mixture_logprob, rtol=0, atol=2e-6)


@pytest.mark.parametrize("tile_steps", [1, 2])
@pytest.mark.parametrize("k", [1, 2, 8, 9, 10, 17, 18, 19, 255, 256, 257])
def test_top_k_bounded_by_the_maxima_of_tiles(tile_steps, k) -> None:
    """9,001 tokens make 18 or 9 tiles: a k of up to that many needs no histogram where so many tiles have mass."""
    uniforms = torch.linspace(0, 1, 8, dtype=torch.float64)
    logits = logits_pair(8, 9001, "cpu", (F32,))[0]
    logits[1] = logits[1].sort().values  # the largest are in one tile
    logits[2, 512:] = -math.inf  # fewer tiles with mass than k
    logits[3] = 0.25  # more candidates than fit
    logits[4] = logits[4].round()  # ties at the bound
    logits[5, 1024:] -= 86.0  # tiles of hardly any mass
    logits[6] *= 1e30
    with tuning.use_plan(native._TUNABLE, native.Plan(tile_steps, 2)):
        for options in ({"top_k": k}, {"top_k": k, "top_p": 0.6}, {"top_k": k, "min_p": 0.3}):
            assert_right(sample([logits], uniforms, **options), logits, None, None, uniforms, **options)


def test_the_plan_is_the_one_that_launches(monkeypatch, emulation) -> None:
    plans = []

    class Module:
        def __getattr__(self, name):
            return getattr(emulation.module, name)

        def mixture_sample(self, *arguments):
            plans.append(arguments[-8:-3])
            emulation.module.mixture_sample(*arguments)

    monkeypatch.setattr(native.capabilities, "native", lambda name: Module())
    forget_plans()
    logits, uniforms = logits_pair(3, 9001, "cpu"), uniforms_for(3, "cpu")
    sample(logits, uniforms)
    with tuning.use_plan(native._TUNABLE, native.Plan(3, 5)):
        sample(logits, uniforms)
    assert plans == [emulation.module.mixture_sample_plan(3, 9001), (3, 5, 8, 1, 1)]
    for wrong in ((0, 1), (5, 1), (1, 0), (1, 1, 5), (1, 1, 9), (1, 1, 8, 0), (1, 1, 8, 3), (1, 1, 8, 1, 3)):
        with (
            tuning.use_plan(native._TUNABLE, native.Plan(*wrong)),
            pytest.raises(ValueError, match="mixture_sample: plan: expected (tile_steps|ex2) from"),
        ):
            sample(logits, uniforms)
