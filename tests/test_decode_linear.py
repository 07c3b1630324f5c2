"""decode_linear: every backend and plan against float64, the same bits in every call, and which backend auto takes."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

import nlhf_kernels
from nlhf_kernels.core import capabilities, settings, tuning
from nlhf_kernels.ops.decode_linear.op import OP, DecodeLinearProblem, measured_faster, workload_of
from tests.support.backends import DEVICE, call, device_of, every_backend
from tests.support.poison import poisoned_allocations, surrounded
from tests.support.tolerances import assert_accurate

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [F32, BF16, F16]


def inputs(rows, columns, width, dtype=F32, bias=True, device=DEVICE):
    generator = torch.Generator().manual_seed(rows + columns + width)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype).to(device)  # noqa: E731
    return draw(rows, width), draw(columns, width), draw(columns) if bias else None


def two(rows, columns, width, first, dtype=F32, bias=True, device=DEVICE):
    """Return operands with a weight for the first rows and one for the rest."""
    own, rest = inputs(rows, columns, width, dtype, bias, device), inputs(rows + 1, columns, width, dtype, bias, device)
    return *own, *rest[1:], first


def _example(device, **sizes):
    return inputs(**sizes, device=device), {}


def _example_of_two(device, **sizes):
    return two(**sizes, device=device), {}


EXAMPLES = [
    partial(_example, rows=32, columns=1152, width=896, dtype=BF16),  # query, key and value of Qwen2-0.5B
    partial(_example, rows=64, columns=192, width=1024, dtype=BF16, bias=False),
    partial(_example, rows=16, columns=4700, width=128, dtype=BF16, bias=False),  # one split
    partial(_example, rows=3, columns=100, width=70, dtype=F16),
    partial(_example, rows=33, columns=300, width=256, dtype=F32),
    partial(_example, rows=1, columns=1, width=1, dtype=F32),
    partial(_example_of_two, rows=64, columns=1152, width=896, first=32, dtype=BF16),
    partial(_example_of_two, rows=24, columns=4700, width=128, first=8, dtype=BF16, bias=False),
    partial(_example_of_two, rows=2, columns=3, width=1, first=1, dtype=F32),
]

SHAPES = [  # rows, columns, width
    (0, 5, 7), (1, 1, 1), (1, 33, 64), (3, 100, 70), (16, 32, 128), (17, 130, 300), (64, 65, 1025),
]  # fmt: skip


def assert_right(result, x, weight, bias, rest_weight=None, rest_bias=None, first=0) -> None:
    if rest_weight is not None:
        assert_right(result[:first], x[:first], weight, bias)
        assert_right(result[first:], x[first:], rest_weight, rest_bias)
        return
    truth = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    pytorch = torch.nn.functional.linear(x, weight, bias)
    # In Triton's interpreter the last rounding truncates: an ulp where rounding to nearest errs by half of one.
    assert_accurate(result, truth, pytorch, constant=1.0 if result.is_cuda else 1.5)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_backends_match_float64(backend, dtype, shape, bias) -> None:
    tensors = inputs(*shape, dtype, bias, device_of(backend))
    x, weight, offsets = (None if tensor is None else surrounded(tensor) for tensor in tensors)
    with poisoned_allocations():
        result = call("decode_linear", backend, x, weight, offsets)
    assert result.shape == shape[:2] and result.is_contiguous()
    assert_right(result, x, weight, offsets)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "first"), [(0, 0), (2, 1), (7, 0), (7, 7), (7, 3), (40, 20), (45, 5), (128, 64)], ids=str
)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_two_weights_match_float64(backend, dtype, rows, first, bias) -> None:
    """The first rows take one weight and the rest the other, whichever are more; either may have none."""
    operands = two(rows, 37, 300, first, dtype, bias, device_of(backend))
    operands = [surrounded(value) if isinstance(value, torch.Tensor) else value for value in operands]
    with poisoned_allocations():
        result = call("decode_linear", backend, *operands)
    assert result.shape == (rows, 37) and result.is_contiguous()
    assert_right(result, *operands)


@pytest.mark.skipif(bool(capabilities.triton_missing()), reason="needs triton")
@pytest.mark.parametrize("splits", [1, 2, 3, 8])
@pytest.mark.parametrize(("columns", "depth"), [(16, 32), (32, 16), (128, 64)])
@pytest.mark.parametrize("width", [10, 96, 200])
def test_every_plan_is_right_and_gives_the_same_bits_again(splits, columns, depth, width) -> None:
    """Splits without an element of the width add nothing, and no sum depends on the order in which programs run."""
    from nlhf_kernels.ops.decode_linear import triton_kernels

    plan = triton_kernels.Plan(columns, depth, splits, warps=4, stages=2)
    for tensors in (inputs(5, 70, width), two(5, 70, width, 3)):
        with tuning.use_plan(triton_kernels._TUNABLE, plan), poisoned_allocations():
            results = [nlhf_kernels.decode_linear(*tensors, backend="triton") for _ in range(2)]
        assert torch.equal(*results)
        assert_right(results[0], *tensors)


def test_a_row_of_zeros_and_one_of_nan_leave_the_others_alone() -> None:
    x, weight, bias = inputs(4, 40, 64)
    x[1], x[2] = 0.0, torch.nan
    for backend in ("torch", "triton"):
        result = call("decode_linear", backend, x, weight, bias)
        torch.testing.assert_close(result[1], bias)
        assert result[2].isnan().all() and not result[[0, 1, 3]].isnan().any()


def test_the_weight_may_be_columns_of_a_wider_one() -> None:
    x, weight, bias = inputs(4, 40, 64)
    wider = torch.cat([weight, torch.full_like(weight, torch.nan)], 1)[:, :64]
    for backend in ("torch", "triton"):
        assert_right(call("decode_linear", backend, x, wider, bias), x, weight, bias)
    with pytest.raises(ValueError, match=r"decode_linear: weight: expected contiguous rows, a weight is not copied"):
        nlhf_kernels.decode_linear(x, weight.T.contiguous().T, bias)


def test_gradients_are_not_recorded() -> None:
    x, weight, bias = inputs(2, 3, 4)
    assert not nlhf_kernels.decode_linear(x, weight.requires_grad_(), bias).requires_grad


def test_bad_input_is_named() -> None:
    x, weight, bias = inputs(2, 3, 4)
    with pytest.raises(ValueError, match=r"weight: expected shape \(columns, width\) with .*width=4; got \(3, 3\)"):
        nlhf_kernels.decode_linear(x, weight[:, :3], bias)
    with pytest.raises(ValueError, match=r"bias: expected shape \(columns\) with columns=3; got \(2,\)"):
        nlhf_kernels.decode_linear(x, weight, bias[:2])
    with pytest.raises(TypeError, match="weight: expected dtype float32; got bfloat16"):
        nlhf_kernels.decode_linear(x, weight.bfloat16(), bias)
    reasons = nlhf_kernels.explain("decode_linear", *inputs(65, 3, 4)).reasons
    assert any("at most 64; got 65" in reason for reason in reasons["triton"])
    with pytest.raises(
        ValueError, match=r"rest_weight: expected shape \(columns, width\) with columns=3.*; got \(2, 4\)"
    ):
        nlhf_kernels.decode_linear(x, weight, bias, weight[:2], bias, 1)
    with pytest.raises(ValueError, match="rest_bias: expected a tensor, as bias; got None"):
        nlhf_kernels.decode_linear(x, weight, bias, weight, None, 1)
    with pytest.raises(ValueError, match="rest_bias: expected None without a rest_weight; got a tensor"):
        nlhf_kernels.decode_linear(x, weight, bias, None, bias)
    for first in (-1, 3):
        with pytest.raises(ValueError, match=rf"first: expected .*; got {first}"):
            nlhf_kernels.decode_linear(x, weight, bias, weight, bias, first)
    with pytest.raises(ValueError, match="first: expected .*; got 1"):
        nlhf_kernels.decode_linear(x, weight, bias, first=1)


def test_the_limit_is_of_the_rows_of_one_weight() -> None:
    limits = lambda *sizes: nlhf_kernels.explain("decode_linear", *two(*sizes)).reasons["triton"]  # noqa: E731
    assert not any("at most 64" in reason for reason in limits(128, 3, 4, 64))
    assert any("at most 64; got 65" in reason for reason in limits(128, 3, 4, 63))


# ---- which backend -----------------------------------------------------------------------------------------------

GPU = torch.device("cuda", 0)


@pytest.fixture
def remember(monkeypatch, tmp_path):
    """Return a function that stores the sweep of one product, as `nlhf-kernels tune` does on a GPU."""
    path = tmp_path / "plans.json"
    monkeypatch.setattr(settings, "tuning", str(path))
    monkeypatch.setattr(tuning, "card_name", lambda device: "A card")
    tuning.tuned_plans.cache_clear()

    def store(problem, plan_us: float, rival_us: float):
        from nlhf_kernels.ops.decode_linear import triton_kernels

        default = triton_kernels.Plan(64, 64, 2, 4, 4)
        other = default._replace(splits=4)
        launch = tuning.Launch(triton_kernels._TUNABLE, workload_of(problem), default)
        tuning.keep("A card", [tuning.Sweep(launch, {default: plan_us + 1, other: plan_us}, rival_us)])
        return json.loads(path.read_text())["cards"]["A card"]

    yield store
    tuning.tuned_plans.cache_clear()


@pytest.mark.skipif(bool(capabilities.triton_missing()), reason="needs triton")
def test_auto_takes_triton_only_where_it_was_measured_faster(remember) -> None:
    problem = DecodeLinearProblem(GPU, BF16, 32, 896, 1152)
    assert OP.order_of(problem)[0] == ("torch",)
    assert remember(problem, 5.0, 5.05) == [], "a gain within noise is none"
    assert not measured_faster(problem)
    (entry,) = remember(problem, 4.0, 5.0)
    assert entry["plan"]["splits"] == 4
    assert OP.order_of(problem)[0] == ("triton", "torch")
    assert measured_faster(problem._replace(rows=17)), "rounded up to a power of two"
    assert not measured_faster(problem._replace(rows=16)) and not measured_faster(problem._replace(columns=1153))
    assert not measured_faster(problem._replace(device=torch.device("cpu")))
    assert not measured_faster(problem._replace(weights=2)), "measured with one weight"
    assert remember(problem, 6.0, 5.0) == [], "measured again, and slower"
    assert not measured_faster(problem)


@pytest.mark.parametrize(("rows", "expected"), [(0, 16), (1, 16), (16, 16), (17, 32), (64, 64)])
def test_few_rows_are_one_workload(rows, expected) -> None:
    problem = DecodeLinearProblem(GPU, BF16, rows, 8, 4)
    assert workload_of(problem) == tuning.Workload(expected, (4, 8), "bfloat16")
    both = tuning.Workload(expected, (4, 8), "bfloat16", "two weights")
    assert workload_of(problem._replace(weights=2)) == both
