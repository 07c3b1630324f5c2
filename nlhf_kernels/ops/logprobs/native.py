"""logprobs through the C++ module."""

from __future__ import annotations

from typing import Any

import torch

from ...core import capabilities
from ...core.native import DTYPES
from .layout import Normalizer, Output, Settings, Transform


def _model(logits: torch.Tensor | None, transform: Transform) -> tuple[Any, ...]:
    if logits is None:
        return (0, 0, 0, *transform)
    return (logits.data_ptr(), DTYPES[logits.dtype], logits.stride(0), *transform)


def _arguments(
    policy: torch.Tensor,
    reference: torch.Tensor | None,
    targets: torch.Tensor,
    beta: torch.Tensor | None,
    settings: Settings,
    values: torch.Tensor,
    normalizers: torch.Tensor,
) -> tuple[Any, ...]:
    """The positional arguments of logprobs_binding.h."""
    return (
        _model(policy, settings.policy),
        _model(reference, settings.reference),
        targets.data_ptr(),
        beta.data_ptr() if beta is not None else 0,
        beta.ndim if beta is not None else 0,  # its stride: 0 for one beta, 1 for one a row
        settings.temperature,
        settings.wanted,
        *policy.shape,
        values.data_ptr(),
        normalizers.data_ptr(),
    )


def logprobs_cpu(
    policy: torch.Tensor,
    reference: torch.Tensor | None,
    targets: torch.Tensor,
    beta: torch.Tensor | None,
    settings: Settings,
) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.empty((len(Output), policy.shape[0]), dtype=torch.float32, device="cpu")
    normalizers = torch.empty((len(Normalizer), policy.shape[0]), dtype=torch.float32, device="cpu")
    arguments = _arguments(policy, reference, targets, beta, settings, values, normalizers)
    capabilities.native("_cpu").logprobs(*arguments, torch.get_num_threads())
    return values, normalizers


def logprobs_backward_cpu(
    policy: torch.Tensor,
    reference: torch.Tensor | None,
    targets: torch.Tensor,
    beta: torch.Tensor | None,
    values: torch.Tensor,
    normalizers: torch.Tensor,
    upstream: torch.Tensor,
    settings: Settings,
    out: torch.Tensor,
) -> None:
    arguments = _arguments(policy, reference, targets, beta, settings, values, normalizers)
    into = (upstream.data_ptr(), out.data_ptr(), out.stride(0))
    capabilities.native("_cpu").logprobs_backward(*arguments, *into, torch.get_num_threads())
