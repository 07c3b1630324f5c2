"""mixture_sample in Triton: one launch sums every tile of every row, a second draws a tile and a token in it.

Equation numbers are those of README.md. Filters add a stage between the two, see triton_filters.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...core import tuning
from ...core.native import on_device
from ...core.rng_triton import open_unit, random_bits
from ...core.triton_launch import Launch, PreparedLaunches, Scratch
from .layout import MixtureSampleInputs, empty_sample
from .triton_filters import find_thresholds
from .triton_tiles import (
    A_PROGRAM_PER_ROW,
    LOG2_E,
    combine_tiles,
    exp_of,
    kernel_arguments,
    kernel_tensors,
    load_tile,
    load_weights,
    sum_of,
    temperature_of,
)

#: Elements per program: a row of 151,936 has 75 programs. With 4 warps a thread has 16 elements per model, two loads of
#: 16 bytes, and few enough registers for several blocks per multiprocessor. The tile depends on the vocabulary alone,
#: never on the number of rows: a token must not depend on the batch.
_TILE = 2048
_MAX_TILES = 1024  # per row, which one program combines; beyond 2 million tokens the tiles grow instead


Sample = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # tokens, logprobs, ok


class Plan(NamedTuple):
    tile: int  # elements per program, a power of two
    warps: int  # of the programs that sum tiles
    draw_warps: int  # of those that choose a token


def _candidates(default: Plan) -> Iterator[Plan]:
    for tile in (1024, 2048, 4096, 8192):
        for warps in (4, 8):
            for draw_warps in (4, 8, 16):
                yield Plan(tile, warps, draw_warps)


_TUNABLE = tuning.Tunable("mixture_sample", "triton", Plan, _candidates)


@triton.jit
def _store_sum(x, to_log2, tops, sums, slot, TILE: tl.constexpr):
    top = tl.max(x, axis=0)
    e = exp_of(x, tl.where(top == float("-inf"), 0.0, top), to_log2)
    tl.store(tops + slot, top)
    tl.store(sums + slot, sum_of(e, TILE))


@triton.jit
def tile_sums_kernel(
    z0, z1, z2, z3,  # (rows, vocabulary)
    bias,  # (vocabulary,) or (rows, vocabulary)
    settings,  # (rows or 1, 4 + MODELS)
    tops,  # (rows, 1 + MODELS, tiles) float32: of y and of each wanted model, the maximum of a tile
    sums,  # likewise float64: the sum of exp(. - maximum)
    thresholds,  # (rows,)
    stride0, stride1, stride2, stride3, bias_stride, settings_stride, vocabulary, tiles,
    MODELS: tl.constexpr, HAS_BIAS: tl.constexpr, WANTED: tl.constexpr, FILTERED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    tile = program % tiles
    slot = row * (1 + MODELS) * tiles + tile
    if FILTERED:
        threshold = tl.load(thresholds + row)
        if threshold == float("-inf"):
            return  # nothing is filtered: keep the sums
    w0, w1, w2, w3 = load_weights(settings, row, settings_stride, MODELS)
    y, m0, m1, m2, m3 = load_tile(
        z0, z1, z2, z3, bias, w0, w1, w2, w3, stride0, stride1, stride2, stride3, bias_stride, vocabulary,
        row, tile * TILE, MODELS, HAS_BIAS, WANTED, TILE,
    )  # fmt: skip
    if FILTERED:
        y = tl.where(y < threshold, float("-inf"), y)
    _, to_log2, _ = temperature_of(settings, row, settings_stride)
    _store_sum(y, to_log2, tops, sums, slot, TILE)
    if WANTED & 1:
        _store_sum(m0, LOG2_E, tops, sums, slot + tiles, TILE)
    if WANTED & 2:
        _store_sum(m1, LOG2_E, tops, sums, slot + 2 * tiles, TILE)
    if WANTED & 4:
        _store_sum(m2, LOG2_E, tops, sums, slot + 3 * tiles, TILE)
    if WANTED & 8:
        _store_sum(m3, LOG2_E, tops, sums, slot + 4 * tiles, TILE)


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
    thresholds,  # (rows,)
    uniforms,  # (rows,) float64
    seed, row_ids, step,  # () or (rows,); (rows,); () or (rows,) int64
    tokens,  # (rows,)
    logprobs,  # (MODELS + 1, rows)
    ok,  # (rows,)
    stride0, stride1, stride2, stride3, bias_stride, settings_stride, vocabulary, tiles,
    seed_stride, step_stride, rows,
    MODELS: tl.constexpr, HAS_BIAS: tl.constexpr, WANTED: tl.constexpr, FILTERED: tl.constexpr,
    HAS_UNIFORMS: tl.constexpr, STREAM: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, SLOTS: tl.constexpr,
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
        threshold = tl.load(thresholds + row)
    if HAS_UNIFORMS:
        u = tl.load(uniforms + row)
    else:
        seed_of_row, step_of_row = tl.load(seed + row * seed_stride), tl.load(step + row * step_stride)
        u = open_unit(random_bits(seed_of_row, tl.load(row_ids + row), step_of_row, STREAM))

    top, masses = combine_tiles(tile_tops, tile_sums, to_log2)
    total = tl.sum(masses, axis=0)
    right = (total > 0) & (total < float("inf"))
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
    rows, vocabulary, device, filtered = inputs.rows, inputs.vocabulary, inputs.device, inputs.filtered
    if not rows:
        return empty_sample
    workload = tuning.make_workload(0, (vocabulary,), inputs.logits, "filtered" if filtered else "")
    plan = _TUNABLE.plan(device, workload, Plan(_TILE, min(16, max(4, _TILE // 512)), A_PROGRAM_PER_ROW["num_warps"]))
    width = max(256, min(plan.tile, triton.next_power_of_2(vocabulary)))
    width = max(width, triton.next_power_of_2(triton.cdiv(vocabulary, _MAX_TILES)))
    tiles = triton.cdiv(vocabulary, width)
    models = len(inputs.logits)
    shape = (rows, 1 + models, tiles)
    scratch = Scratch(device, (shape, torch.float32), (shape, torch.float64), ((rows,), torch.float32))
    pointers, sizes, flags = kernel_arguments(inputs)
    # The mixture's log-probability needs no further sums.
    flags |= {"TILE": width, "WANTED": inputs.logprob_mask & ((1 << models) - 1)}
    sizes = (*sizes, tiles)
    sums = Launch(
        tile_sums_kernel, rows * tiles, pointers + 3, sizes, flags | {"FILTERED": False, "num_warps": plan.warps}
    )
    draw_flags = {
        "FILTERED": filtered, "HAS_UNIFORMS": inputs.uniforms is not None, "STREAM": inputs.stream,
        "TILES": max(16, triton.next_power_of_2(tiles)), "SLOTS": triton.next_power_of_2(models),
        **A_PROGRAM_PER_ROW, "num_warps": plan.draw_warps,
    }  # fmt: skip
    strides = tuple([0 if x is None else x.ndim for x in (inputs.seed, inputs.step)])
    draw = Launch(draw_kernel, rows, pointers + 10, (*sizes, *strides, rows), flags | draw_flags)
    launches = PreparedLaunches(device, scratch, (sums, draw))

    def sample(inputs: MixtureSampleInputs) -> Sample:
        result = empty_sample(inputs)
        launches(kernel_tensors(inputs), (*_draw_tensors(inputs), *result))
        return result

    return partial(_sample_filtered, scratch=scratch, sums=sums, draw=draw) if filtered else sample


def _sample_filtered(inputs: MixtureSampleInputs, scratch: Scratch, sums: Launch, draw: Launch) -> Sample:
    result, memory = empty_sample(inputs), scratch.allocate()
    views = scratch.views(memory)
    pointers = [*kernel_tensors(inputs), *views, *_draw_tensors(inputs), *result]

    def start(launch: Launch, **options: object) -> None:
        taken = pointers[: launch.pointers]
        launch.kernel[(launch.programs,)](*taken, *launch.integers, **launch.options | options)

    with on_device(inputs.device):
        start(sums)
        views[2].copy_(find_thresholds(inputs, *views[:2]))
        start(sums, WANTED=0, FILTERED=True)
        start(draw)
    return result


def _draw_tensors(inputs: MixtureSampleInputs) -> tuple[torch.Tensor, ...]:
    """Return the kernel's arguments from uniforms to step; for absent ones a tensor that is not read."""
    unread = inputs.settings
    given = (inputs.uniforms, inputs.seed, inputs.row_ids, inputs.step)
    return tuple([unread if x is None else x for x in given])
