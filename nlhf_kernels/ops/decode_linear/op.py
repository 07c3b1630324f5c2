"""decode_linear: a linear layer over the few rows of a decoding step, bound by reading its weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ...core import torch_op, tuning
from ...core.calls import Calls
from ...core.checks import FLOATS, Sizes, check_integer, check_is_tensor, check_not_empty, check_tensor
from ...core.registry import Backend, Measured, Op, register

_HERE = "nlhf_kernels.ops.decode_linear"
MAX_ROWS = 64  # more rows fill cuBLAS's tiles, and the product is no longer bound by its weight
LEAST_ROWS = 16  # of a tensor-core product: fewer rows are padded, and take the same plan


class DecodeLinearInputs(NamedTuple):
    x: torch.Tensor  # (R, D) float32, bfloat16 or float16
    weight: torch.Tensor  # (N, D), its rows contiguous
    bias: torch.Tensor | None  # (N,)
    rest_weight: torch.Tensor | None  # (N, D): of all rows but the first
    rest_bias: torch.Tensor | None  # (N,): None where `bias` is
    first: int  # rows that take `weight`, where there is a `rest_weight`
    backend: str


class DecodeLinearProblem(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    rows: int  # of one weight, at most
    width: int  # D
    columns: int  # N
    weights: int = 1


def problem_of(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    rest_weight: torch.Tensor | None = None,
    rest_bias: torch.Tensor | None = None,
    first: int = 0,
) -> DecodeLinearProblem:
    """Describe a call: its device, dtype and sizes."""
    rows = x.shape[0]
    weights = 1 if rest_weight is None or first in (0, rows) else 2
    share = rows if weights == 1 else max(first, rows - first)
    return DecodeLinearProblem(x.device, x.dtype, share, x.shape[1], weight.shape[0], weights)


def _triton_limits(problem: DecodeLinearProblem) -> list[str]:
    if problem.rows > MAX_ROWS:
        return [f"rows: all rows of a weight share one tile, at most {MAX_ROWS}; got {problem.rows}"]
    return []


def workload_of(problem: DecodeLinearProblem) -> tuning.Workload:
    """Describe a product to the tuner: all numbers of rows up to LEAST_ROWS are one workload."""
    dtype = str(problem.dtype).removeprefix("torch.")
    rows = max(LEAST_ROWS, 1 << (problem.rows - 1).bit_length()) if problem.rows else LEAST_ROWS
    variant = "two weights" if problem.weights == 2 else ""
    return tuning.Workload(rows, (problem.columns, problem.width), dtype, variant)


def measured_faster(problem: DecodeLinearProblem) -> bool:
    """Whether `nlhf-kernels tune` has measured the Triton kernel faster than cuBLAS for this product on this GPU."""
    if problem.device.type != "cuda":
        return False
    return tuning.is_tuned("decode_linear", "triton", problem.device, workload_of(problem))


OP = register(
    Op(
        name="decode_linear",
        backends=(
            Backend("torch", f"{_HERE}.oracle:decode_linear"),
            Backend(
                "triton", f"{_HERE}.triton_kernels:decode_linear", _triton_limits,
                preparation=f"{_HERE}.triton_kernels:prepare",
            ),
        ),
        order={"cuda": ("torch",), "cpu": ("torch",)},
        measured=(
            Measured("cuda", "products that Triton computes faster", measured_faster, ("triton", "torch"),
                     "nlhf-kernels tune, on this GPU"),
        ),
        describe=problem_of,
        absent={
            "cuda": "reading the weight bounds it, Triton streams it: CUDA waits for a measurement of bandwidth left",
            "cpu": "PyTorch's product reads the weight once as well",
        },
    )
)  # fmt: skip


def _check(inputs: DecodeLinearInputs) -> DecodeLinearProblem:
    x, weight, bias, rest_weight, rest_bias, first, _ = inputs
    op = OP.name
    sizes: Sizes = {}
    check_tensor(op, "x", x, ("rows", "width"), FLOATS, sizes)
    for name, value in (("weight", weight), ("rest_weight", rest_weight)):
        if value is None:
            continue
        check_tensor(op, name, value, ("columns", "width"), (x.dtype,), sizes, x.device)
        check_not_empty(op, name, sizes, "columns", "width")
        if value.stride(1) != 1 and value.shape[1] > 1:
            raise ValueError(
                f"{op}: {name}: expected contiguous rows, a weight is not copied; got strides {value.stride()}"
            )
    for name, value in (("bias", bias), ("rest_bias", rest_bias)):
        if value is not None:
            check_tensor(op, name, value, ("columns",), (x.dtype,), sizes, x.device)
    if rest_weight is None:
        if rest_bias is not None:
            raise ValueError(f"{op}: rest_bias: expected None without a rest_weight; got a tensor")
        check_integer(op, "first", first, 0, 0)
    else:
        if (bias is None) != (rest_bias is None):
            expected, got = ("None", "a tensor") if bias is None else ("a tensor", "None")
            raise ValueError(f"{op}: rest_bias: expected {expected}, as bias; got {got}")
        check_integer(op, "first", first, 0, x.shape[0])
    return problem_of(*inputs[:-1])


_calls = Calls(OP, DecodeLinearInputs, _check)


def _run(inputs: DecodeLinearInputs) -> torch.Tensor:
    x, weight, bias, rest_weight, rest_bias, first, backend = inputs
    one_serves_all = rest_weight is not None and first in (0, *x.shape[:1])
    if one_serves_all or not all(each is None or each.is_contiguous() for each in (x, bias, rest_bias)):
        _check(inputs)
        if one_serves_all and rest_weight is not None:
            weight, bias = (weight, bias) if first else (rest_weight, rest_bias)
            rest_weight, rest_bias, first = None, None, 0
        bias, rest_bias = (None if each is None else each.contiguous() for each in (bias, rest_bias))
        inputs = DecodeLinearInputs(x.contiguous(), weight, bias, rest_weight, rest_bias, first, backend)
    result: torch.Tensor = _calls.run(inputs)
    return result


def empty_result(inputs: DecodeLinearInputs) -> torch.Tensor:
    """Allocate (R, N): what the fake returns and the kernel fills."""
    _check(inputs)
    return inputs.x.new_empty((inputs.x.shape[0], inputs.weight.shape[0]))


_operator: Callable[[DecodeLinearInputs], torch.Tensor] = torch_op.define(
    "decode_linear", DecodeLinearInputs, "Tensor", _run, empty_result, run_known=_calls.run_known
)


def decode_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    rest_weight: torch.Tensor | None = None,
    rest_bias: torch.Tensor | None = None,
    first: int = 0,
    *,
    backend: str | None = None,
) -> torch.Tensor:  # (R, N)
    """Return x weight^T + bias for the few rows of a decoding step. Not differentiable; gradients are not recorded.

    Two models of one shape take one launch: with `rest_weight`, the `first` rows are one model's and take `weight`, the
    rest are the other's. Sums are in float32 and always in one order: the same call gives the same bits, a captured
    graph's replay included.

    Args:
        x ((R, D) float32, bfloat16 or float16): a vector a row.
        weight ((N, D), dtype as x): the layer's, as torch.nn.Linear holds it; rows contiguous.
        bias ((N,), dtype as x): likewise; None is none.
        rest_weight ((N, D), dtype as x): of all rows but the first; None: all rows take `weight`.
        rest_bias ((N,), dtype as x): likewise, where there is a bias.
        first (int in [0, R]): rows that take `weight`, where there is a `rest_weight`.
        backend: see `use_backend`; None leaves the choice to it: PyTorch's product, and Triton's where `nlhf-kernels
            tune` has measured it faster on this GPU.
    """
    for name, value in (("x", x), ("weight", weight)):
        check_is_tensor(OP.name, name, value)
    optional = {"bias": bias, "rest_weight": rest_weight, "rest_bias": rest_bias}
    for name, option in optional.items():
        if option is not None:
            check_is_tensor(OP.name, name, option)
    bias, rest_weight, rest_bias = (None if option is None else _detached(option) for option in optional.values())
    operands = DecodeLinearInputs(_detached(x), _detached(weight), bias, rest_weight, rest_bias, first, backend or "")
    return _operator(operands)


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach() if tensor.requires_grad else tensor
