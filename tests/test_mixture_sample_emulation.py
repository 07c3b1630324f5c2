"""mixture_sample's CUDA sources on the CPU: the shared test bodies, run with the emulated kernels behind backend "cpu".

What is tested is the logic (barriers, reductions over blocks, indices, edges), not memory ordering and not speed.
"""

from __future__ import annotations

import contextlib
import ctypes

import pytest
import torch

from nlhf_kernels.core import capabilities
from nlhf_kernels.ops.mixture_sample import native
from nlhf_kernels.ops.mixture_sample.op import OP
from tests import test_mixture_sample as shared
from tests import test_mixture_sample_filters as filters
from tests.emulation.fixture import CRAMPED

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def _emulated_cuda(emulation, monkeypatch) -> None:
    real = capabilities.native
    monkeypatch.setattr(native.capabilities, "native", lambda name: emulation.module if name == "_cuda" else real(name))
    monkeypatch.setattr(capabilities, "native_missing", lambda name: "")
    monkeypatch.setattr(native, "cuda_stream", lambda device: 0)
    monkeypatch.setattr(native, "on_device", lambda device: contextlib.nullcontext())
    monkeypatch.setitem(OP.backend("cpu").__dict__, "run", native.mixture_sample_cuda)


@pytest.mark.parametrize("dtypes", shared.DTYPE_PAIRS, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 2, 7, 999, 1024, 4097])
def test_draws_match_float64(dtypes, vocabulary) -> None:
    shared.test_draws_match_float64("cpu", dtypes, vocabulary)


@pytest.mark.parametrize("device", [0, CRAMPED])
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

    monkeypatch.setitem(OP.backend("cpu").__dict__, "run", refuse)
    with pytest.raises(ZeroDivisionError):
        shared.test_ends_of_the_uniform("cpu")
