"""mixture_sample through the C++ modules."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch

from ...core import capabilities, tuning
from ...core.native import DTYPES, Counters, cuda_stream, on_device
from .layout import MixtureSampleInputs, empty_sample

_counters = Counters()


Sample = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # tokens, logprobs, ok


def binding_arguments(inputs: MixtureSampleInputs, sample: Sample) -> tuple[object, ...]:
    """Return the positional arguments of mixture_sample_binding.h."""
    logits, settings, filtered, bias, uniforms, seed, row_ids, step, stream, logprob_mask, _ = inputs
    tokens, logprobs, ok = sample
    rows, vocabulary = logits[0].shape
    return (
        tuple([(model.data_ptr(), DTYPES[model.dtype], model.stride(0)) for model in logits]),
        settings.data_ptr(),
        settings.shape[1] if settings.shape[0] > 1 else 0,
        filtered,
        0 if bias is None else bias.data_ptr(),
        bias.stride(0) if bias is not None and bias.ndim == 2 else 0,
        0 if uniforms is None else uniforms.data_ptr(),
        0 if seed is None else seed.data_ptr(),
        0 if seed is None else seed.ndim,  # its stride: 0 for one seed, 1 for one a row
        0 if row_ids is None else row_ids.data_ptr(),
        0 if step is None else step.data_ptr(),
        0 if step is None else step.ndim,
        stream,
        rows,
        vocabulary,
        logprob_mask,
        tokens.data_ptr(),
        logprobs.data_ptr(),
        ok.data_ptr(),
    )


def mixture_sample_cpu(inputs: MixtureSampleInputs) -> Sample:
    sample = empty_sample(inputs)
    capabilities.native("_cpu").mixture_sample(*binding_arguments(inputs, sample), torch.get_num_threads())
    return sample


class Plan(NamedTuple):
    tile_steps: int  # of 512 elements, 1 to 4
    part_tiles: int  # tiles per block
    ex2: int = 8  # of every eight exponentials, those that special-function units compute: 8, 7 or 6
    arrival: int = 1  # how a row's blocks meet: 1 by a counter in memory, 2 as a cluster (8 blocks, sm_90 and newer)
    lookahead: int = 1  # 2: a warp's next step is fetched into the second-level cache while it computes one


def _candidates(default: Plan) -> Iterator[Plan]:
    """Yield plans worth a measurement; one that this GPU or this vocabulary does not allow fails and is passed over."""
    part_tiles = (1, 2, 4, 8, 16, 24, 32, 48, 64)
    for tile_steps in (1, 2, 3, 4):
        for tiles in part_tiles:
            yield Plan(tile_steps, tiles)
    for tiles in part_tiles[3:]:
        for tile_steps in (1, 2, 4):
            plan = Plan(tile_steps, tiles)
            yield from (plan._replace(lookahead=2), plan._replace(arrival=2), plan._replace(arrival=2, lookahead=2))
            yield from (plan._replace(ex2=7), plan._replace(ex2=7, lookahead=2), plan._replace(ex2=6))


_TUNABLE = tuning.Tunable("mixture_sample", "cuda", Plan, _candidates)


@lru_cache(maxsize=4096)
def _default_plan(device: torch.device, rows: int, vocabulary: int) -> Plan:
    """Return the plan of the current device's kernels; `device` is part of the cache key."""
    return Plan(*capabilities.native("_cuda").mixture_sample_plan(rows, vocabulary))


class _Call(NamedTuple):
    """What calls of one shape share."""

    workload: tuning.Workload
    plan: Plan  # unless another was tuned
    workspace_bytes: int
    counter_bytes: int


@lru_cache(maxsize=4096)
def _call(device: torch.device, rows: int, vocabulary: int, dtypes: tuple[torch.dtype, ...], filtered: bool) -> _Call:
    module = capabilities.native("_cuda")
    tensors = [torch.empty(0, dtype=dtype, device="meta") for dtype in dtypes]
    return _Call(
        tuning.make_workload(rows, (vocabulary,), tensors, "filtered" if filtered else ""),
        _default_plan(device, rows, vocabulary),
        module.mixture_sample_workspace(rows, vocabulary, len(dtypes), filtered),
        module.mixture_sample_counters(rows),
    )


def mixture_sample_cuda(inputs: MixtureSampleInputs) -> Sample:
    logits, device, sample = inputs.logits, inputs.device, empty_sample(inputs)
    rows, vocabulary = logits[0].shape
    with on_device(device):
        call = _call(device, rows, vocabulary, tuple([model.dtype for model in logits]), inputs.filtered)
        plan = _TUNABLE.plan(device, call.workload, call.plan)
        # PyTorch's allocator keeps it for this stream: two streams never share it, a captured graph owns its own.
        workspace = torch.empty(call.workspace_bytes, dtype=torch.uint8, device=device)
        stream = cuda_stream(device)
        counters = _counters.address(device, stream, call.counter_bytes)
        capabilities.native("_cuda").mixture_sample(
            *binding_arguments(inputs, sample), *plan, workspace.data_ptr(), counters, stream
        )
    return sample


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
    settings = torch.empty((1, 6), dtype=torch.float32, device=device)  # read, and of no effect on the maxima
    uniforms = torch.empty(rows, dtype=torch.float64, device=device)
    inputs = MixtureSampleInputs(
        [policy, reference], settings, False, None, uniforms, None, None, None, stream=0, logprob_mask=0, backend="cuda"
    )
    with on_device(device):
        plan = _default_plan(device, rows, vocabulary)
        maxima = torch.empty(rows * 2 * -(-vocabulary // 512), dtype=torch.float32, device=device)
        arguments = binding_arguments(inputs, empty_sample(inputs))
        parts = module.mixture_sample_floor(*arguments, *plan, maxima.data_ptr(), cuda_stream(device))
    return maxima[: rows * 2 * parts].view(rows, 2, parts)
