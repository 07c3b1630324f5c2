"""logprobs through the C++ module."""

from __future__ import annotations

import torch

from ...core import capabilities
from ...core.native import DTYPES
from .layout import LogprobsBackwardInputs, LogprobsInputs, Transform, empty_outputs


def _model(logits: torch.Tensor | None, transform: Transform) -> tuple[float, ...]:
    if logits is None:
        return (0, 0, 0, *transform)
    return (logits.data_ptr(), DTYPES[logits.dtype], logits.stride(0), *transform)


def _arguments(inputs: LogprobsInputs, values: torch.Tensor, normalizers: torch.Tensor) -> tuple[object, ...]:
    """Return the positional arguments of logprobs_binding.h."""
    beta, settings = inputs.beta, inputs.settings
    return (
        _model(inputs.policy, settings.policy),
        _model(inputs.reference, settings.reference),
        inputs.targets.data_ptr(),
        0 if beta is None else beta.data_ptr(),
        0 if beta is None else beta.ndim,  # its stride: 0 for one beta, 1 for one a row
        settings.temperature,
        settings.extras,
        *inputs.policy.shape,
        values.data_ptr(),
        normalizers.data_ptr(),
    )


def logprobs_cpu(inputs: LogprobsInputs) -> tuple[torch.Tensor, torch.Tensor]:
    values, normalizers = empty_outputs(inputs)
    capabilities.native("_cpu").logprobs(*_arguments(inputs, values, normalizers), torch.get_num_threads())
    return values, normalizers


def logprobs_backward_cpu(inputs: LogprobsBackwardInputs, out: torch.Tensor) -> None:
    arguments = _arguments(inputs.forward, inputs.values, inputs.normalizers)
    gradient = (inputs.upstream.data_ptr(), out.data_ptr(), out.stride(0))
    capabilities.native("_cpu").logprobs_backward(*arguments, *gradient, torch.get_num_threads())
