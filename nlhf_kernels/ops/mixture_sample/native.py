"""mixture_sample through the C++ modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...core import capabilities
from ...core.native import DTYPES, Counters, cuda_stream, on_device

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # tokens, logprobs, ok

_counters = Counters()


def empty_outputs(models: int, rows: int, device: torch.device) -> Outputs:
    return (
        torch.empty(rows, dtype=torch.int64, device=device),
        torch.empty((models + 1, rows), dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.bool, device=device),
    )


def _arguments(
    outputs: Outputs,
    logits: Sequence[torch.Tensor],
    settings: torch.Tensor,
    filtered: bool,
    bias: torch.Tensor | None,
    uniforms: torch.Tensor | None,
    seed: torch.Tensor,
    row_ids: torch.Tensor,
    step: torch.Tensor,
    stream: int,
    wanted: int,
) -> tuple[Any, ...]:
    """The positional arguments of mixture_sample_binding.h."""
    rows, vocabulary = logits[0].shape
    tokens, logprobs, ok = outputs
    return (
        tuple((model.data_ptr(), DTYPES[model.dtype], model.stride(0)) for model in logits),
        settings.data_ptr(),
        settings.shape[1] if settings.shape[0] > 1 else 0,
        filtered,
        bias.data_ptr() if bias is not None else 0,
        bias.stride(0) if bias is not None and bias.ndim == 2 else 0,
        uniforms.data_ptr() if uniforms is not None else 0,
        seed.data_ptr(),
        seed.ndim,
        row_ids.data_ptr(),
        step.data_ptr(),
        step.ndim,
        stream,
        rows,
        vocabulary,
        wanted,
        tokens.data_ptr(),
        logprobs.data_ptr(),
        ok.data_ptr(),
    )


def mixture_sample_cpu(logits: Sequence[torch.Tensor], *rest: Any) -> Outputs:
    outputs = empty_outputs(len(logits), logits[0].shape[0], logits[0].device)
    capabilities.native("_cpu").mixture_sample(*_arguments(outputs, logits, *rest), torch.get_num_threads())
    return outputs


def mixture_sample_cuda(logits: Sequence[torch.Tensor], settings: torch.Tensor, filtered: bool, *rest: Any) -> Outputs:
    rows, vocabulary = logits[0].shape
    device = logits[0].device
    outputs = empty_outputs(len(logits), rows, device)
    module = capabilities.native("_cuda")
    # From PyTorch's allocator, so it belongs to the stream: two streams never share it, a captured graph owns its own.
    size = module.mixture_sample_workspace(rows, vocabulary, len(logits), filtered)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    arguments = _arguments(outputs, logits, settings, filtered, *rest)
    with on_device(device):
        stream = cuda_stream(device)
        counters = _counters.address(device, stream, module.mixture_sample_counters(rows))
        module.mixture_sample(*arguments, workspace.data_ptr(), counters, stream)
    return outputs
