"""mirror_descent through the C++ modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ...core import capabilities, tuning
from ...core.native import cuda_stream, on_device

_OPPONENTS = ("policy", "mixture", "given")  # enum class Opponent of mirror_descent.h


def _arguments(
    out: torch.Tensor,
    log_policy: torch.Tensor,
    preference: torch.Tensor,
    log_reference: torch.Tensor,
    tau: torch.Tensor,
    step_sizes: torch.Tensor,
    opponent: str,
    log_opponent: torch.Tensor | None,
) -> tuple[int | bool, ...]:
    games, actions = log_policy.shape
    return (
        log_policy.dtype == torch.float64,
        log_policy.data_ptr(),
        preference.data_ptr(),
        log_reference.data_ptr(),
        tau.data_ptr(),
        tau.ndim,  # its stride: 0 for one tau, 1 for one a game
        step_sizes.data_ptr(),
        games,
        actions,
        step_sizes.numel(),
        _OPPONENTS.index(opponent),
        log_opponent.data_ptr() if log_opponent is not None else 0,
        out.data_ptr(),
    )


def mirror_descent_cpu(log_policy: torch.Tensor, *rest: Any) -> torch.Tensor:
    out = torch.empty_like(log_policy)
    arguments = _arguments(out, log_policy, *rest)
    capabilities.native("_cpu").mirror_descent(*arguments, torch.get_num_threads())
    return out


class Plan(NamedTuple):
    parts: int  # blocks a game; beyond 1 every iteration is a launch of its own
    threads: int  # of a block, for games of more than 128 actions or several parts


def _candidates(default: Plan) -> Iterator[Plan]:
    for parts in (1, 2, 4, 8, 16, 33, 66):
        for threads in (256, 512):
            yield Plan(parts, threads)


_TUNABLE = tuning.Tunable("mirror_descent", "cuda", Plan, _candidates)


def mirror_descent_cuda(log_policy: torch.Tensor, *rest: Any) -> torch.Tensor:
    out = torch.empty_like(log_policy)
    device, (games, actions), is_double = log_policy.device, log_policy.shape, log_policy.dtype == torch.float64
    module = capabilities.native("_cuda")
    with on_device(device):
        workload = tuning.make_workload(games, (actions,), (log_policy,))
        plan = _TUNABLE.plan(device, workload, Plan(*module.mirror_descent_plan(is_double, games, actions)))
        size = module.mirror_descent_workspace(is_double, games, actions, plan.parts)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        arguments = (*_arguments(out, log_policy, *rest), *plan, workspace.data_ptr())
        module.mirror_descent(*arguments, cuda_stream(device))
    return out
