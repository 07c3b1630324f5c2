"""row_uniforms through the C++ modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ...core import capabilities, tuning
from ...core.native import cuda_stream, on_device
from .op import RowUniformsInputs


def _arguments(inputs: RowUniformsInputs, out: torch.Tensor) -> tuple[int, ...]:
    """Return the positional arguments that both bindings of row_uniforms share."""
    seed, row_ids, step, stream, _ = inputs
    return (
        seed.data_ptr(), seed.ndim, row_ids.data_ptr(), step.data_ptr(), step.ndim, stream, row_ids.numel(),
        out.data_ptr(),
    )  # fmt: skip


def row_uniforms_cpu(inputs: RowUniformsInputs) -> torch.Tensor:
    out = torch.empty_like(inputs.row_ids, dtype=torch.float64)
    capabilities.native("_cpu").row_uniforms(*_arguments(inputs, out), torch.get_num_threads())
    return out


class Plan(NamedTuple):
    threads: int  # of a block


def _candidates(default: Plan) -> Iterator[Plan]:
    return map(Plan, (64, 128, 256, 512))


_TUNABLE = tuning.Tunable("row_uniforms", "cuda", Plan, _candidates)


def row_uniforms_cuda(inputs: RowUniformsInputs) -> torch.Tensor:
    out = torch.empty_like(inputs.row_ids, dtype=torch.float64)
    device = out.device
    plan = _TUNABLE.plan(device, tuning.make_workload(out.numel(), (), (inputs.row_ids,)), Plan(256))
    with on_device(device):
        capabilities.native("_cuda").row_uniforms(*_arguments(inputs, out), *plan, cuda_stream(device))
    return out
