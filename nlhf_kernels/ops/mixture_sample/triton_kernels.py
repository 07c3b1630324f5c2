"""mixture_sample in Triton: one launch sums every tile of every row, a second draws a tile and a token in it.

Equation numbers are those of README.md. Filters add two launches between these, see triton_filters.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...core import tuning
from ...core.prepared import Result, Slot, Source, slots_of
from ...core.rng_triton import open_unit, random_bits
from ...core.triton_launch import Launch, Scratch, TritonCall
from .layout import MixtureSampleInputs, empty_sample, sample_results
from .triton_filters import (
    bin_sums_kernel,
    bracket_kernel,
    find_threshold,
    gather_kernel,
    masses_of_bins,
    sample_step,
)
from .triton_tiles import (
    A_PROGRAM_PER_ROW,
    LOG2_E,
    combine_tiles,
    exp_of,
    kernel_arguments,
    kernel_tensors,
    load_tile,
    load_weights,
    store_sums,
    temperature_of,
)

#: Elements per program: a row of 151,936 has 75 programs. With 4 warps a thread has 16 elements per model, two loads of
#: 16 bytes, and few enough registers for several blocks per multiprocessor. The tile depends on the vocabulary alone,
#: never on the number of rows: a token must not depend on the batch.
_TILE = 2048
_MAX_TILES = 1024  # per row, which one program combines; beyond 2 million tokens the tiles grow instead


Sample = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # tokens, logprobs, ok


class Plan(NamedTuple):
    tile: int  # elements summed at a time, a power of two
    warps: int  # of the programs that sum tiles
    draw_warps: int  # of those that choose a token
    group: int = 1  # with filters: tiles a program; each writes one histogram
    bins: int = 1  # of a histogram, a power of two
    listed: int = 1  # most values between the bins' ends that a row's search keeps in a list


def _candidates(default: Plan) -> Iterator[Plan]:
    for tile in (1024, 2048, 4096, 8192):
        for warps in (4, 8):
            for draw_warps in (4, 8, 16):
                yield default._replace(tile=tile, warps=warps, draw_warps=draw_warps)
    if default.bins > 1:
        for bins in (64, 128, 256, 512):
            for group in (1, 2, 4, 8):
                yield default._replace(bins=bins, group=group)


_TUNABLE = tuning.Tunable("mixture_sample", "triton", Plan, _candidates)
_UNFILTERED = Plan(_TILE, min(16, max(4, _TILE // 512)), A_PROGRAM_PER_ROW["num_warps"])
#: Triton counts a value in a histogram by ten to twenty instructions and one of a quarter's speed for every 32 bins. Of
#: 151,936 Gaussian logits of any scale, a bin at a threshold of top-p then holds about 2,700, and two or three may.
_FILTERED = _UNFILTERED._replace(warps=8, group=4, bins=128, listed=16_384)


@triton.jit
def tile_sums_kernel(
    z0, z1, z2, z3,  # (rows, vocabulary)
    bias,  # (vocabulary,) or (rows, vocabulary)
    settings,  # (rows or 1, 4 + MODELS)
    tops,  # (rows, 1 + MODELS, tiles) float32: of y and of each wanted model, the maximum of a tile
    sums,  # likewise float64: the sum of exp(. - maximum)
    stride0, stride1, stride2, stride3, bias_stride, settings_stride, vocabulary, tiles,
    MODELS: tl.constexpr, HAS_BIAS: tl.constexpr, WANTED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    tile = program % tiles
    w0, w1, w2, w3 = load_weights(settings, row, settings_stride, MODELS)
    y, m0, m1, m2, m3 = load_tile(
        z0, z1, z2, z3, bias, w0, w1, w2, w3, stride0, stride1, stride2, stride3, bias_stride, vocabulary,
        row, tile * TILE, MODELS, HAS_BIAS, WANTED, TILE,
    )  # fmt: skip
    _, to_log2, _ = temperature_of(settings, row, settings_stride)
    store_sums(y, m0, m1, m2, m3, to_log2, tops, sums, row * (1 + MODELS) * tiles + tile, tiles, WANTED, TILE)


@triton.jit
def _first_beyond(cumulative, mass, target, N: tl.constexpr):
    """Return the first index whose cumulative mass exceeds target, (2); if rounding leaves none, the last with mass.

    A parallel scan may rise by a rounding error where the mass is 0, hence the condition mass > 0. One reduction finds
    both: a candidate of the first kind counts as 2 N - index, which is more than any index.
    """
    index = tl.arange(0, N)
    last = tl.where(mass > 0, index, 0)
    best = tl.max(tl.where((cumulative > target) & (mass > 0), 2 * N - index, last), axis=0)
    return tl.where(best > N, 2 * N - best, best)


@triton.jit
def _pick(picked, x0, x1):
    """Return the values of x0 and x1 where `picked` holds, at one index, by one reduction: each waits for all warps."""
    both = tl.sum(tl.where(picked[:, None], tl.join(x0, x1), 0.0), axis=0)
    return tl.split(both)


@triton.jit
def draw_kernel(
    z0, z1, z2, z3,  # (rows, vocabulary)
    bias,  # (vocabulary,) or (rows, vocabulary)
    settings,  # (rows or 1, 4 + MODELS)
    tops,  # (rows, 1 + MODELS, tiles) float32
    sums,  # (rows, 1 + MODELS, tiles) float64
    windows, bins, states, offsets, kept, starts, values,  # as in gather_kernel, or one number that is not read
    uniforms,  # (rows,) float64
    seed, row_ids, step,  # () or (rows,); (rows,); () or (rows,) int64
    tokens,  # (rows,)
    logprobs,  # (MODELS + 1, rows)
    ok,  # (rows,)
    stride0, stride1, stride2, stride3, bias_stride, settings_stride, vocabulary, tiles,
    seed_stride, step_stride, rows,
    MODELS: tl.constexpr, HAS_BIAS: tl.constexpr, WANTED: tl.constexpr, FILTERED: tl.constexpr,
    HAS_UNIFORMS: tl.constexpr, STREAM: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, SLOTS: tl.constexpr,
    BINS: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    # All loads but those of the chosen tile precede the first reduction, so that their latencies overlap.
    tile = tl.arange(0, TILES)
    here = tile < tiles
    first = row * (1 + MODELS) * tiles
    tile_tops = tl.load(tops + first + tile, mask=here, other=float("-inf"))
    tile_sums = tl.load(sums + first + tile, mask=here, other=0.0)
    if WANTED:
        model = tl.arange(0, SLOTS)[:, None]
        slot = first + (1 + model) * tiles + tile[None, :]
        wanted = ((WANTED >> model) & 1 == 1) & here[None, :]
        model_tops = tl.load(tops + slot, mask=wanted, other=float("-inf"))
        model_sums = tl.load(sums + slot, mask=wanted, other=0.0)
    w0, w1, w2, w3 = load_weights(settings, row, settings_stride, MODELS)
    temperature, to_log2, greedy = temperature_of(settings, row, settings_stride)
    if FILTERED:
        state = states + row * 8
        mass_of_tile = tl.load(kept + row * tiles + tile, mask=here, other=0.0)
        k, p = tl.load(settings + row * settings_stride + 1), tl.load(settings + row * settings_stride + 2)
        n, searched = tl.load(state + 3), (tl.load(state + 5) + tl.load(state + 6)) > 0
        threshold = tl.load(state + 7).to(tl.float32)
    if HAS_UNIFORMS:
        u = tl.load(uniforms + row)
    else:
        seed_of_row, step_of_row = tl.load(seed + row * seed_stride), tl.load(step + row * step_stride)
        u = open_unit(random_bits(seed_of_row, tl.load(row_ids + row), step_of_row, STREAM))

    top, masses = combine_tiles(tile_tops, tile_sums, to_log2)
    total = tl.sum(masses, axis=0)
    right = (total > 0) & (total < float("inf"))
    if FILTERED:
        if searched:
            list_of_row, listed = values + row * LIST, n <= LIST
            found = find_threshold(
                list_of_row, listed, states, windows, top, total, tl.sum(mass_of_tile, axis=0), p, k, to_log2,
                z0, z1, z2, z3, bias, w0, w1, w2, w3, stride0, stride1, stride2, stride3, bias_stride, vocabulary,
                row, MODELS, HAS_BIAS, BINS,
            )  # fmt: skip
            threshold = tl.maximum(threshold, found)
            mass_of_tile += masses_of_bins(
                list_of_row, listed, starts, states, windows, top, threshold, to_log2, tiles,
                z0, z1, z2, z3, bias, w0, w1, w2, w3, stride0, stride1, stride2, stride3, bias_stride, vocabulary,
                row, MODELS, HAS_BIAS, BINS, TILE, TILES,
            )  # fmt: skip
        masses = mass_of_tile
        total = tl.sum(masses, axis=0)
    # A greedy row is the draw u = 0 from equal masses on its maxima.
    target = tl.where(greedy, 0.0, u * total)
    masses = tl.where(greedy, ((tile_tops == top) & here).to(tl.float64), masses)
    cumulative = tl.cumsum(masses, axis=0)
    chosen = _first_beyond(cumulative, masses, target, TILES)
    before, tile_top = _pick(tile == chosen, cumulative - masses, tile_tops.to(tl.float64))
    target -= before
    tile_top = tile_top.to(tl.float32)
    factor = exp_of(tile_top, top, to_log2).to(tl.float64)

    y, m0, m1, m2, m3 = load_tile(
        z0, z1, z2, z3, bias, w0, w1, w2, w3, stride0, stride1, stride2, stride3, bias_stride, vocabulary,
        row, chosen * TILE, MODELS, HAS_BIAS, WANTED, TILE,
    )  # fmt: skip
    if WANTED:  # while the tile arrives
        model_top = tl.max(model_tops, axis=1)
        scaled = exp_of(model_tops, model_top[:, None], LOG2_E).to(tl.float64) * model_sums
        log_sums = tl.log(tl.sum(scaled, axis=1).to(tl.float32))
    if FILTERED:
        y = tl.where(y < threshold, float("-inf"), y)
    masses = exp_of(y, tile_top, to_log2).to(tl.float64) * factor
    masses = tl.where(greedy, (y == top).to(tl.float64), masses)
    index = _first_beyond(tl.cumsum(masses, axis=0), masses, target, TILE)
    picked = tl.arange(0, TILE) == index
    tl.store(tokens + row, tl.where(right, chosen * TILE + index, 0).to(tl.int64))

    y_picked, z_picked = _pick(picked, y, m0)
    logprob = tl.where(greedy, 0.0, (y_picked - top) / temperature - tl.log(total.to(tl.float32)))
    tl.store(logprobs + row + MODELS * rows, tl.where(right, logprob, float("nan")))
    fine = right
    if WANTED:
        number = tl.arange(0, SLOTS)
        picked_logits = tl.where(number == 0, z_picked, 0.0)
        if WANTED & 6:
            z1_picked, z2_picked = _pick(picked, m1, m2)
            picked_logits = tl.where(number == 1, z1_picked, tl.where(number == 2, z2_picked, picked_logits))
        if WANTED & 8:
            picked_logits = tl.where(number == 3, tl.sum(tl.where(picked, m3, 0.0), axis=0), picked_logits)
        values = picked_logits - model_top - log_sums
        asked = (WANTED >> number) & 1 == 1
        tl.store(logprobs + row + number * rows, tl.where(right, values, float("nan")), mask=asked)
        fine = fine & (tl.sum((asked & (values != values)).to(tl.int32), axis=0) == 0)
    tl.store(ok + row, fine)


def mixture_sample(inputs: MixtureSampleInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return prepare(inputs)(inputs)


def prepare(inputs: MixtureSampleInputs) -> Callable[[MixtureSampleInputs], Sample]:
    """Return the function that samples with inputs of this signature: what depends on sizes is computed here, once."""
    if not inputs.rows:
        return empty_sample
    launches, scratch = launches_of(inputs)
    return TritonCall(inputs.device, sample_results(inputs), scratch, launches)


def launches_of(inputs: MixtureSampleInputs) -> tuple[list[Launch], Scratch]:
    """Return the launches for inputs of this signature, and their working memory."""
    rows, vocabulary, device, filtered = inputs.rows, inputs.vocabulary, inputs.device, inputs.filtered
    workload = tuning.make_workload(0, (vocabulary,), inputs.logits, "filtered" if filtered else "")
    plan = _TUNABLE.plan(device, workload, _FILTERED if filtered else _UNFILTERED)
    width = max(256, min(plan.tile, triton.next_power_of_2(vocabulary)))
    width = max(width, triton.next_power_of_2(triton.cdiv(vocabulary, _MAX_TILES)))
    tiles, models = triton.cdiv(vocabulary, width), len(inputs.logits)
    chunks = triton.cdiv(tiles, plan.group)
    sizes, shared = kernel_arguments(inputs)
    sizes = (*sizes, tiles)
    scratch = _scratch(rows, models, tiles, chunks, plan, filtered)
    slots = slots_of(inputs)
    results = [Slot(Source.RESULT, index) for index in range(3)]
    pointers = [*kernel_tensors(slots), *scratch.slots, *_draw_tensors(slots), *results]
    given = len(kernel_tensors(slots))
    # The mixture's log-probability needs no further sums.
    wanted = {"WANTED": inputs.logprob_mask & ((1 << models) - 1)}
    tiled = {**shared, "TILE": width}
    combined = {"TILES": max(16, triton.next_power_of_2(tiles)), "BINS": plan.bins}
    if filtered:
        grouped = {**tiled, "GROUP": plan.group, "BINS": plan.bins, "num_warps": plan.warps}
        sampled = (*sizes, chunks, sample_step(vocabulary))
        bracket = {"MODELS": models, "enable_fp_fusion": False, "num_warps": A_PROGRAM_PER_ROW["num_warps"], **combined}
        launches = [
            Launch(bin_sums_kernel, (rows * chunks,), pointers[: given + 4], sampled, grouped | wanted),
            Launch(bracket_kernel, (rows,), pointers[: given + 6], (*sizes, chunks), bracket),
            Launch(
                gather_kernel, (rows * chunks,), pointers[: given + 9], (*sizes, chunks),
                grouped | {"LIST": plan.listed},
            ),
        ]  # fmt: skip
    else:
        sums = {**tiled, **wanted, "num_warps": plan.warps}
        launches = [Launch(tile_sums_kernel, (rows * tiles,), pointers[: given + 2], sizes, sums)]
    draw = {
        **tiled, **wanted, **combined, "FILTERED": filtered, "LIST": plan.listed, "STREAM": inputs.stream,
        "HAS_UNIFORMS": inputs.uniforms is not None, "SLOTS": triton.next_power_of_2(models),
        **A_PROGRAM_PER_ROW, "num_warps": plan.draw_warps,
    }  # fmt: skip
    strides = tuple([0 if x is None else x.ndim for x in (inputs.seed, inputs.step)])
    launches.append(Launch(draw_kernel, (rows,), pointers, (*sizes, *strides, rows), draw))
    return launches, scratch


def _scratch(rows: int, models: int, tiles: int, chunks: int, plan: Plan, filtered: bool) -> Scratch:
    """Return the memory from tops to values; without filters one number for each that they alone need."""
    f32, f64, i32 = torch.float32, torch.float64, torch.int32
    sums = (rows, 1 + models, tiles)
    pieces = [
        Result((rows, 2), f32), Result((rows, chunks, plan.bins), i32), Result((rows, 8), f64),
        Result((rows, chunks), i32), Result((rows, tiles), f64), Result((rows, tiles), i32),
        Result((rows, plan.listed), f32),
    ]  # fmt: skip
    if not filtered:
        pieces = [Result((1,), kind) for _, kind in pieces]
    return Scratch(Result(sums, f32), Result(sums, f64), *pieces)


def _draw_tensors(inputs: Any) -> tuple[Any, ...]:
    """Return the kernel's arguments from uniforms to step; for absent ones a tensor that is not read.

    Args:
        inputs (MixtureSampleInputs): of tensors or of Slots.
    """
    unread = inputs.settings
    given = (inputs.uniforms, inputs.seed, inputs.row_ids, inputs.step)
    return tuple([unread if x is None else x for x in given])
