"""decode_linear: a linear layer over the few rows of a decoding step, bound by reading its weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ...core import torch_op, tuning
from ...core.calls import Calls
from ...core.checks import FLOATS, Sizes, check_is_tensor, check_not_empty, check_tensor
from ...core.registry import Backend, Measured, Op, register

_HERE = "nlhf_kernels.ops.decode_linear"
MAX_ROWS = 64  # more rows fill cuBLAS's tiles, and the product is no longer bound by its weight
LEAST_ROWS = 16  # of a tensor-core product: fewer rows are padded, and take the same plan


class DecodeLinearInputs(NamedTuple):
    x: torch.Tensor  # (R, D) float32, bfloat16 or float16
    weight: torch.Tensor  # (N, D), its rows contiguous
    bias: torch.Tensor | None  # (N,)
    backend: str


class DecodeLinearProblem(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    rows: int
    width: int  # D
    columns: int  # N


def problem_of(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> DecodeLinearProblem:
    """Describe a call: its device, dtype and sizes."""
    return DecodeLinearProblem(x.device, x.dtype, x.shape[0], x.shape[1], weight.shape[0])


def _triton_limits(problem: DecodeLinearProblem) -> list[str]:
    if problem.rows > MAX_ROWS:
        return [f"rows: all rows share one tile, at most {MAX_ROWS}; got {problem.rows}"]
    return []


def workload_of(problem: DecodeLinearProblem) -> tuning.Workload:
    """Describe a product to the tuner: all numbers of rows up to LEAST_ROWS are one workload."""
    dtype = str(problem.dtype).removeprefix("torch.")
    rows = max(LEAST_ROWS, 1 << (problem.rows - 1).bit_length()) if problem.rows else LEAST_ROWS
    return tuning.Workload(rows, (problem.columns, problem.width), dtype)


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
    x, weight, bias, _ = inputs
    op = OP.name
    sizes: Sizes = {}
    check_tensor(op, "x", x, ("rows", "width"), FLOATS, sizes)
    check_tensor(op, "weight", weight, ("columns", "width"), (x.dtype,), sizes, x.device)
    check_not_empty(op, "weight", sizes, "columns", "width")
    if weight.stride(1) != 1 and weight.shape[1] > 1:
        raise ValueError(
            f"{op}: weight: expected contiguous rows, a weight is not copied; got strides {weight.stride()}"
        )
    if bias is not None:
        check_tensor(op, "bias", bias, ("columns",), (x.dtype,), sizes, x.device)
    return problem_of(x, weight)


_calls = Calls(OP, DecodeLinearInputs, _check)


def _run(inputs: DecodeLinearInputs) -> torch.Tensor:
    x, weight, bias, backend = inputs
    if not (x.is_contiguous() and (bias is None or bias.is_contiguous())):
        _check(inputs)
        inputs = DecodeLinearInputs(x.contiguous(), weight, None if bias is None else bias.contiguous(), backend)
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
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, backend: str | None = None
) -> torch.Tensor:  # (R, N)
    """Return x weight^T + bias for the few rows of a decoding step. Not differentiable; gradients are not recorded.

    Sums are in float32 and always in one order: the same call gives the same bits, a captured graph's replay included.

    Args:
        x ((R, D) float32, bfloat16 or float16): a vector a row.
        weight ((N, D), dtype as x): the layer's, as torch.nn.Linear holds it; rows contiguous.
        bias ((N,), dtype as x): likewise; None is none.
        backend: see `use_backend`; None leaves the choice to it: PyTorch's product, and Triton's where `nlhf-kernels
            tune` has measured it faster on this GPU.
    """
    for name, value in (("x", x), ("weight", weight)):
        check_is_tensor(OP.name, name, value)
    if bias is not None:
        check_is_tensor(OP.name, "bias", bias)
    bias = None if bias is None else _detached(bias)
    return _operator(DecodeLinearInputs(_detached(x), _detached(weight), bias, backend or ""))


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach() if tensor.requires_grad else tensor
