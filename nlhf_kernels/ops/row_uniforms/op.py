"""row_uniforms: the uniform that decides a row's sample, as every sampler of the library draws it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...core import torch_op
from ...core.checks import check_counter, check_integer, check_is_tensor
from ...core.registry import Backend, Op, register

_HERE = "nlhf_kernels.ops.row_uniforms"


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


def _check(seed: torch.Tensor, row_ids: torch.Tensor, step: torch.Tensor, stream: int) -> None:
    check_counter(OP.name, seed, row_ids, step, {}, row_ids.device)
    check_integer(OP.name, "stream", stream, 0, 255)


def _run(seed: torch.Tensor, row_ids: torch.Tensor, step: torch.Tensor, stream: int, backend: str) -> torch.Tensor:
    _check(seed, row_ids, step, stream)
    run = OP.resolve(backend, RowUniformsProblem(row_ids.device)).run
    result: torch.Tensor = run(seed.contiguous(), row_ids.contiguous(), step.contiguous(), stream)
    return result


def _fake(seed: torch.Tensor, row_ids: torch.Tensor, step: torch.Tensor, stream: int, backend: str) -> torch.Tensor:
    _check(seed, row_ids, step, stream)
    return row_ids.new_empty(row_ids.shape, dtype=torch.float64)


_operator = torch_op.define(
    "row_uniforms", "(Tensor seed, Tensor row_ids, Tensor step, int stream, str backend) -> Tensor", _run, _fake
)


def row_uniforms(
    seed: torch.Tensor,  # () or (R,) int64
    row_ids: torch.Tensor,  # (R,) int64
    step: torch.Tensor,  # () or (R,) int64
    *,
    stream: int = 0,
    backend: str | None = None,
) -> torch.Tensor:
    """One float64 uniform in (0, 1) per row, a function of (seed, row id, step, stream) alone.

    seed, row_ids and step are int64 tensors on one device, so that a captured graph advances when they change; of
    step the low 32 bits count. stream tells independent draws for one row apart: 0 the policy's response, 1 the
    opponent's (`core.rng.Stream`), 128 to 255 are yours.
    """
    for name, value in (("seed", seed), ("row_ids", row_ids), ("step", step)):
        check_is_tensor(OP.name, name, value)
    if not isinstance(stream, int):
        check_integer(OP.name, "stream", stream, 0, 255)
    result: torch.Tensor = _operator(seed, row_ids, step, stream, backend or "")
    return result
