"""row_uniforms through the C++ modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ...core import capabilities, tuning
from ...core.native import cuda_stream, on_device


def _pointers(seed: torch.Tensor, row_ids: torch.Tensor, step: torch.Tensor) -> tuple[int, ...]:
    return seed.data_ptr(), seed.ndim, row_ids.data_ptr(), step.data_ptr(), step.ndim


def row_uniforms_cpu(seed: torch.Tensor, row_ids: torch.Tensor, step: torch.Tensor, stream: int) -> torch.Tensor:
    rows = row_ids.numel()
    out = torch.empty(rows, dtype=torch.float64, device="cpu")
    pointers = _pointers(seed, row_ids, step)
    capabilities.native("_cpu").row_uniforms(*pointers, stream, rows, out.data_ptr(), torch.get_num_threads())
    return out


class Plan(NamedTuple):
    threads: int  # of a block


def _candidates(default: Plan) -> Iterator[Plan]:
    return map(Plan, (64, 128, 256, 512))


_TUNABLE = tuning.Tunable("row_uniforms", "cuda", Plan, _candidates)


def row_uniforms_cuda(seed: torch.Tensor, row_ids: torch.Tensor, step: torch.Tensor, stream: int) -> torch.Tensor:
    rows = row_ids.numel()
    out = torch.empty(rows, dtype=torch.float64, device=row_ids.device)
    pointers = _pointers(seed, row_ids, step)
    plan = _TUNABLE.plan(row_ids.device, tuning.make_workload(rows, (), (row_ids,)), Plan(256))
    with on_device(row_ids.device):
        arguments = (*pointers, stream, rows, out.data_ptr(), *plan)
        capabilities.native("_cuda").row_uniforms(*arguments, cuda_stream(row_ids.device))
    return out
