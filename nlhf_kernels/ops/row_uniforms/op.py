"""row_uniforms: the uniform number that determines a row's sample in every sampler of the library."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...core import torch_op
from ...core.checks import check_counter, check_integer, check_is_tensor
from ...core.registry import Backend, Op, register

_HERE = "nlhf_kernels.ops.row_uniforms"


class RowUniformsInputs(NamedTuple):
    seed: torch.Tensor  # () or (R,) int64
    row_ids: torch.Tensor  # (R,) int64
    step: torch.Tensor  # () or (R,) int64
    stream: int
    backend: str


class RowUniformsProblem(NamedTuple):
    device: torch.device


def _describe(seed: torch.Tensor, row_ids: torch.Tensor, step: torch.Tensor, *, stream: int = 0) -> RowUniformsProblem:
    return RowUniformsProblem(row_ids.device)


OP = register(
    Op(
        name="row_uniforms",
        backends=(
            Backend("torch", f"{_HERE}.oracle:row_uniforms"),
            Backend("triton", f"{_HERE}.triton_kernels:row_uniforms"),
            Backend("cuda", f"{_HERE}.native:row_uniforms_cuda"),
            Backend("cpu", f"{_HERE}.native:row_uniforms_cpu"),
        ),
        order={"cuda": ("cuda", "triton", "torch"), "cpu": ("cpu", "torch")},
        describe=_describe,
    )
)


def _check(inputs: RowUniformsInputs) -> None:
    check_counter(OP.name, inputs.seed, inputs.row_ids, inputs.step, {}, inputs.row_ids.device)
    check_integer(OP.name, "stream", inputs.stream, 0, 255)


def _run(inputs: RowUniformsInputs) -> torch.Tensor:
    _check(inputs)
    seed, row_ids, step, stream, backend = inputs
    if not (seed.is_contiguous() and row_ids.is_contiguous() and step.is_contiguous()):
        inputs = RowUniformsInputs(seed.contiguous(), row_ids.contiguous(), step.contiguous(), stream, backend)
    result: torch.Tensor = OP.resolve(backend, RowUniformsProblem(row_ids.device)).run(inputs)
    return result


def _fake(inputs: RowUniformsInputs) -> torch.Tensor:
    _check(inputs)
    return torch.empty_like(inputs.row_ids, dtype=torch.float64, memory_format=torch.contiguous_format)


_operator = torch_op.define("row_uniforms", RowUniformsInputs, "Tensor", _run, _fake)


def row_uniforms(
    seed: torch.Tensor,
    row_ids: torch.Tensor,
    step: torch.Tensor,
    *,
    stream: int = 0,
    backend: str | None = None,
) -> torch.Tensor:  # (R,)
    """Return one float64 uniform in (0, 1) per row, a function of (seed, row id, step, stream) alone.

    The three tensors lie on one device, so that a captured graph advances when they change.

    Args:
        seed (() or (R,) int64): of all rows, or of each.
        row_ids ((R,) int64): identifies the rows.
        step (() or (R,) int64): the decoding step; its low 32 bits count.
        stream: distinguishes independent draws for one row: 0 the policy's response, 1 the opponent's
            (`core.rng.Stream`), 128 to 255 are free for the caller.
        backend: see `use_backend`; None leaves the choice to it.
    """
    for name, value in (("seed", seed), ("row_ids", row_ids), ("step", step)):
        check_is_tensor(OP.name, name, value)
    if not isinstance(stream, int):
        check_integer(OP.name, "stream", stream, 0, 255)
    return _operator(RowUniformsInputs(seed, row_ids, step, stream, backend or ""))
