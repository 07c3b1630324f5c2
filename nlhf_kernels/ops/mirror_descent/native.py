"""mirror_descent through the C++ modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ...core import capabilities, tuning
from ...core.native import cuda_stream, on_device
from .op import MirrorDescentInputs

_OPPONENTS = ("policy", "mixture", "fixed")  # enum class Opponent of mirror_descent.h


def _arguments(inputs: MirrorDescentInputs, out: torch.Tensor) -> tuple[int | bool, ...]:
    """Return the positional arguments that both bindings of mirror_descent share."""
    log_policy, preference, log_reference, tau, step_sizes, opponent, log_opponent, _ = inputs
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
        0 if log_opponent is None else log_opponent.data_ptr(),
        out.data_ptr(),
    )


def mirror_descent_cpu(inputs: MirrorDescentInputs) -> torch.Tensor:
    out = torch.empty_like(inputs.log_policy)
    capabilities.native("_cpu").mirror_descent(*_arguments(inputs, out), torch.get_num_threads())
    return out


class Plan(NamedTuple):
    parts: int  # blocks per game; with more than 1 every iteration is a separate launch
    threads: int  # of a block, for games of more than 128 actions or several parts


def _candidates(default: Plan) -> Iterator[Plan]:
    for parts in (1, 2, 4, 8, 16, 33, 66):
        for threads in (256, 512):
            yield Plan(parts, threads)


_TUNABLE = tuning.Tunable("mirror_descent", "cuda", Plan, _candidates)


def mirror_descent_cuda(inputs: MirrorDescentInputs) -> torch.Tensor:
    log_policy = inputs.log_policy
    out = torch.empty_like(log_policy)
    device, (games, actions), is_double = log_policy.device, log_policy.shape, log_policy.dtype == torch.float64
    module = capabilities.native("_cuda")
    with on_device(device):
        workload = tuning.make_workload(games, (actions,), (log_policy,))
        plan = _TUNABLE.plan(device, workload, Plan(*module.mirror_descent_plan(is_double, games, actions)))
        size = module.mirror_descent_workspace(is_double, games, actions, plan.parts)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        module.mirror_descent(*_arguments(inputs, out), *plan, workspace.data_ptr(), cuda_stream(device))
    return out
