"""mixture_sample through the C++ modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from ...core import capabilities, tuning
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


class Plan(NamedTuple):
    tile_steps: int  # of 512 elements, 1 to 4
    part_tiles: int  # tiles a block


def _candidates(default: Plan) -> Iterator[Plan]:
    for tile_steps in (1, 2, 3, 4):
        for part_tiles in (1, 2, 4, 8, 16, 24, 32, 48, 64):
            yield Plan(tile_steps, part_tiles)


_TUNABLE = tuning.Tunable("mixture_sample", "cuda", Plan, _candidates)


@lru_cache(maxsize=4096)
def _default_plan(device: torch.device, rows: int, vocabulary: int) -> Plan:
    """The plan of the current device's kernels; `device` tells devices apart."""
    return Plan(*capabilities.native("_cuda").mixture_sample_plan(rows, vocabulary))


@lru_cache(maxsize=4096)
def _workload(rows: int, vocabulary: int, dtypes: tuple[torch.dtype, ...], filtered: bool) -> tuning.Workload:
    tensors = [torch.empty(0, dtype=dtype, device="meta") for dtype in dtypes]
    return tuning.make_workload(rows, (vocabulary,), tensors, "filtered" if filtered else "")


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
        workload = _workload(rows, vocabulary, tuple(model.dtype for model in logits), filtered)
        plan = _TUNABLE.plan(device, workload, _default_plan(device, rows, vocabulary))
        stream = cuda_stream(device)
        counters = _counters.address(device, stream, module.mixture_sample_counters(rows))
        module.mixture_sample(*arguments, *plan, workspace.data_ptr(), counters, stream)
    return outputs


def mixture_sample_floor(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Read the logits of two models as the sampler does, and return the maxima of each row, model and block.

    For benchmarks: the sampler's launch without its arithmetic, on a GPU.

    Args:
        policy (R, V): float32, bfloat16 or float16, elements of a row side by side.
        reference (R, V): of the same dtype.
    """
    rows, vocabulary = policy.shape
    device = policy.device
    module = capabilities.native("_cuda")
    outputs = empty_outputs(2, rows, device)
    settings = torch.ones((1, 6), dtype=torch.float32, device=device)
    uniforms, unused = (torch.empty(rows, dtype=dtype, device=device) for dtype in (torch.float64, torch.int64))
    call = (settings, False, None, uniforms, unused[:0], unused[:0], unused[:0], 0, 0)
    with on_device(device):
        plan = _default_plan(device, rows, vocabulary)
        maxima = torch.empty(rows * 2 * -(-vocabulary // 512), dtype=torch.float32, device=device)
        arguments = _arguments(outputs, (policy, reference), *call)
        parts = module.mixture_sample_floor(*arguments, *plan, maxima.data_ptr(), cuda_stream(device))
    return maxima[: rows * 2 * parts].view(rows, 2, parts)
