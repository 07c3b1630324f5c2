"""mirror_descent through the C++ modules."""

from __future__ import annotations

from typing import Any

import torch

from ...core import capabilities
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


def mirror_descent_cuda(log_policy: torch.Tensor, *rest: Any) -> torch.Tensor:
    out = torch.empty_like(log_policy)
    arguments = _arguments(out, log_policy, *rest)
    with on_device(log_policy.device):
        capabilities.native("_cuda").mirror_descent(*arguments, cuda_stream(log_policy.device))
    return out
