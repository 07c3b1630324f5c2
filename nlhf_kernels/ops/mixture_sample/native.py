"""mixture_sample through the C++ modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch

from ...core import capabilities, tuning
from ...core.native import DTYPES, Counters, cuda_stream, is_current, on_device
from ...core.prepared import PreparedCall, Slot, Source, addresses_of, slots_of
from .layout import MixtureSampleInputs, empty_sample, sample_results

_counters = Counters()


Sample = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # tokens, logprobs, ok


def binding_arguments(inputs: MixtureSampleInputs, addresses: Any, sample: Sequence[Any]) -> tuple[Any, ...]:
    """Return the positional arguments of mixture_sample_binding.h.

    Args:
        inputs (MixtureSampleInputs): the tensors, of which sizes and strides are taken.
        addresses (MixtureSampleInputs): with an address, or a Slot for it, in the place of each.
        sample (three): the addresses of tokens, logprobs and ok.
    """
    logits, settings, filtered, bias, _, seed, _, step, stream, logprob_mask, _ = inputs
    rows, vocabulary = logits[0].shape
    models = zip(addresses.logits, logits, strict=True)
    return (
        tuple([(address, DTYPES[model.dtype], model.stride(0)) for address, model in models]),
        addresses.settings,
        settings.shape[1] if settings.shape[0] > 1 else 0,
        filtered,
        addresses.bias or 0,
        bias.stride(0) if bias is not None and bias.ndim == 2 else 0,
        addresses.uniforms or 0,
        addresses.seed or 0,
        0 if seed is None else seed.ndim,  # its stride: 0 for one seed, 1 for one a row
        addresses.row_ids or 0,
        addresses.step or 0,
        0 if step is None else step.ndim,
        stream,
        rows,
        vocabulary,
        logprob_mask,
        *sample,
    )


def _prepared_arguments(inputs: MixtureSampleInputs) -> tuple[Any, ...]:
    return binding_arguments(inputs, slots_of(inputs), [Slot(Source.RESULT, index) for index in range(3)])


def mixture_sample_cpu(inputs: MixtureSampleInputs) -> Sample:
    sample: Sample = prepare_cpu(inputs)(inputs)
    return sample


def prepare_cpu(inputs: MixtureSampleInputs) -> PreparedCall:
    """Return how inputs of this signature are sampled by `_cpu`."""
    threads = Slot(Source.NOW, 0)
    step = capabilities.native("_cpu").mixture_sample, (*_prepared_arguments(inputs), threads)
    return PreparedCall(inputs.device, sample_results(inputs), [step], now=[torch.get_num_threads])


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


def mixture_sample_cuda(inputs: MixtureSampleInputs) -> Sample:
    sample: Sample = prepare_cuda(inputs)(inputs)
    return sample


def prepare_cuda(inputs: MixtureSampleInputs) -> PreparedCall:
    """Return how inputs of this signature are sampled by `_cuda`."""
    logits, device = inputs.logits, inputs.device
    rows, vocabulary = inputs.rows, inputs.vocabulary
    module = capabilities.native("_cuda")
    with on_device(device):
        workload = tuning.make_workload(rows, (vocabulary,), logits, "filtered" if inputs.filtered else "")
        plan = _TUNABLE.plan(device, workload, _default_plan(device, rows, vocabulary))
    # PyTorch's allocator keeps it for this stream: two streams never share it, a captured graph owns its own.
    workspace = module.mixture_sample_workspace(rows, vocabulary, len(logits), inputs.filtered)
    counter_bytes = module.mixture_sample_counters(rows)
    now = [partial(cuda_stream, device), partial(_counters_of_stream, device, counter_bytes)]
    places = Slot(Source.SCRATCH, 0), Slot(Source.NOW, 1), Slot(Source.NOW, 0)
    step = module.mixture_sample, (*_prepared_arguments(inputs), *plan, *places)
    return PreparedCall(device, sample_results(inputs), [step], max(workspace, 1), now, partial(is_current, device))


def _counters_of_stream(device: torch.device, size: int) -> int:
    return _counters.address(device, cuda_stream(device), size)


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
        sample = empty_sample(inputs)
        arguments = binding_arguments(inputs, addresses_of(inputs), [part.data_ptr() for part in sample])
        parts = module.mixture_sample_floor(*arguments, *plan, maxima.data_ptr(), cuda_stream(device))
    return maxima[: rows * 2 * parts].view(rows, 2, parts)
