"""mixture_sample in Triton: one launch sums every tile of every row, a second draws a tile and a token in it.

Equation numbers are those of README.md. Filters add a stage between the two, see triton_filters.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...core import tuning
from ...core.native import on_device
from ...core.rng_triton import open_unit, random_bits
from .layout import MixtureSampleInputs, empty_sample
from .triton_filters import find_thresholds
from .triton_tiles import (
    A_PROGRAM_PER_ROW,
    LOG2_E,
    combine_tiles,
    exp_of,
    kernel_arguments,
    load_tile,
    sum_of,
    temperature_of,
)

#: Elements per program: a row of 151,936 has 75 programs. With 4 warps a thread has 16 elements per model, two loads of
#: 16 bytes, and few enough registers for several blocks per multiprocessor. The tile depends on the vocabulary alone,
#: never on the number of rows: a token must not depend on the batch.
_TILE = 2048
_MAX_TILES = 1024  # per row, which one program combines; beyond 2 million tokens the tiles grow instead


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
    stride0, stride1, stride2, stride3, bias_stride, settings_stride, vocabulary,
    thresholds,  # (rows,)
    tops,  # (rows, tiles, 1 + MODELS) float32: of y and of each wanted model, the maximum of a tile
    sums,  # likewise float64: the sum of exp(. - maximum)
    tiles,
    MODELS: tl.constexpr, HAS_BIAS: tl.constexpr, WANTED: tl.constexpr, FILTERED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    slot = program.to(tl.int64) * (1 + MODELS)
    if FILTERED:
        threshold = tl.load(thresholds + row)
        if threshold == float("-inf"):
            return  # nothing is filtered: keep the sums
    y, m0, m1, m2, m3 = load_tile(
        z0, z1, z2, z3, bias, settings, stride0, stride1, stride2, stride3, bias_stride, settings_stride, vocabulary,
        row, program % tiles * TILE, MODELS, HAS_BIAS, WANTED, TILE,
    )  # fmt: skip
    if FILTERED:
        y = tl.where(y < threshold, float("-inf"), y)
    _, to_log2, _ = temperature_of(settings, row, settings_stride)
    _store_sum(y, to_log2, tops, sums, slot, TILE)
    if WANTED & 1:
        _store_sum(m0, LOG2_E, tops, sums, slot + 1, TILE)
    if WANTED & 2:
        _store_sum(m1, LOG2_E, tops, sums, slot + 2, TILE)
    if WANTED & 4:
        _store_sum(m2, LOG2_E, tops, sums, slot + 3, TILE)
    if WANTED & 8:
        _store_sum(m3, LOG2_E, tops, sums, slot + 4, TILE)


@triton.jit
def _first_beyond(mass, target, N: tl.constexpr):
    """Return the first index whose cumulative mass exceeds target, (2); if rounding leaves none, the last with mass.

    A parallel scan may rise by a rounding error where the mass is 0, hence the condition mass > 0.
    """
    index = tl.arange(0, N)
    first = tl.min(tl.where((tl.cumsum(mass, axis=0) > target) & (mass > 0), index, N), axis=0)
    last = tl.max(tl.where(mass > 0, index, 0), axis=0)
    return tl.where(first < N, first, last)


@triton.jit
def _logprob(m, picked, tops, sums, slot, here):
    """Return one model's log-probability of the token."""
    _, top, _, masses = combine_tiles(tops, sums, slot, here, LOG2_E)
    return tl.sum(tl.where(picked, m, 0.0), axis=0) - top - tl.log(tl.sum(masses, axis=0).to(tl.float32))


@triton.jit
def draw_kernel(
    z0, z1, z2, z3,  # (rows, vocabulary)
    bias,  # (vocabulary,) or (rows, vocabulary)
    settings,  # (rows or 1, 4 + MODELS)
    stride0, stride1, stride2, stride3, bias_stride, settings_stride, vocabulary,
    thresholds,  # (rows,)
    tops,  # (rows, tiles, 1 + MODELS) float32
    sums,  # (rows, tiles, 1 + MODELS) float64
    tiles,
    uniforms,  # (rows,) float64
    seed, row_ids, step,  # () or (rows,); (rows,); () or (rows,) int64
    seed_stride, step_stride,
    tokens,  # (rows,)
    logprobs,  # (MODELS + 1, rows)
    ok,  # (rows,)
    rows,
    MODELS: tl.constexpr, HAS_BIAS: tl.constexpr, WANTED: tl.constexpr, FILTERED: tl.constexpr,
    HAS_UNIFORMS: tl.constexpr, STREAM: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if HAS_UNIFORMS:
        u = tl.load(uniforms + row)
    else:
        seed_of_row, step_of_row = tl.load(seed + row * seed_stride), tl.load(step + row * step_stride)
        u = open_unit(random_bits(seed_of_row, tl.load(row_ids + row), step_of_row, STREAM))
    temperature, to_log2, greedy = temperature_of(settings, row, settings_stride)

    tile = tl.arange(0, TILES)
    here = tile < tiles
    slot = (row * tiles + tile) * (1 + MODELS)
    tile_tops, top, factors, masses = combine_tiles(tops, sums, slot, here, to_log2)
    total = tl.sum(masses, axis=0)
    right = (total > 0) & (total < float("inf"))
    # A greedy row is the draw u = 0 from equal masses on its maxima.
    u = tl.where(greedy, 0.0, u)
    masses = tl.where(greedy, ((tile_tops == top) & here).to(tl.float64), masses)
    target = u * tl.sum(masses, axis=0)
    chosen = _first_beyond(masses, target, TILES)
    target -= tl.sum(tl.where(tile < chosen, masses, 0.0), axis=0)
    tile_top = tl.sum(tl.where(tile == chosen, tile_tops, 0.0), axis=0)
    factor = tl.sum(tl.where(tile == chosen, factors, 0.0), axis=0)

    y, m0, m1, m2, m3 = load_tile(
        z0, z1, z2, z3, bias, settings, stride0, stride1, stride2, stride3, bias_stride, settings_stride, vocabulary,
        row, chosen * TILE, MODELS, HAS_BIAS, WANTED, TILE,
    )  # fmt: skip
    if FILTERED:
        y = tl.where(y < tl.load(thresholds + row), float("-inf"), y)
    masses = exp_of(y, tile_top, to_log2).to(tl.float64) * factor
    masses = tl.where(greedy, (y == top).to(tl.float64), masses)
    index = _first_beyond(masses, target, TILE)
    picked = tl.arange(0, TILE) == index
    tl.store(tokens + row, tl.where(right, chosen * TILE + index, 0).to(tl.int64))

    y_picked = tl.sum(tl.where(picked, y, 0.0), axis=0)
    logprob = tl.where(greedy, 0.0, (y_picked - top) / temperature - tl.log(total.to(tl.float32)))
    tl.store(logprobs + row + MODELS * rows, tl.where(right, logprob, float("nan")))
    fine = right
    for m in tl.static_range(MODELS):
        if WANTED >> m & 1:
            z = m0 if m == 0 else (m1 if m == 1 else (m2 if m == 2 else m3))
            logprob = _logprob(z, picked, tops, sums, slot + 1 + m, here)
            tl.store(logprobs + row + m * rows, tl.where(right, logprob, float("nan")))
            fine = fine & (logprob == logprob)
    tl.store(ok + row, fine)


def mixture_sample(inputs: MixtureSampleInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sample = empty_sample(inputs)
    rows, vocabulary, device = inputs.rows, inputs.vocabulary, inputs.device
    if not rows:
        return sample
    models = len(inputs.logits)
    workload = tuning.make_workload(0, (vocabulary,), inputs.logits, "filtered" if inputs.filtered else "")
    plan = _TUNABLE.plan(device, workload, Plan(_TILE, min(16, max(4, _TILE // 512)), A_PROGRAM_PER_ROW["num_warps"]))
    width = max(256, min(plan.tile, triton.next_power_of_2(vocabulary)))
    width = max(width, triton.next_power_of_2(triton.cdiv(vocabulary, _MAX_TILES)))
    tiles = triton.cdiv(vocabulary, width)
    tops = torch.empty((rows, tiles, 1 + models), dtype=torch.float32, device=device)
    sums = torch.empty((rows, tiles, 1 + models), dtype=torch.float64, device=device)
    model_mask = inputs.logprob_mask & ((1 << models) - 1)  # the mixture's log-probability needs no further sums
    arguments = kernel_arguments(inputs)
    flags = {**arguments.flags, "TILE": width}
    thresholds = tops  # a placeholder that is not read, unless filtered
    with on_device(device):

        def sum_tiles(**options: object) -> None:
            tile_sums_kernel[(rows * tiles,)](
                *arguments.tensors, *arguments.sizes, thresholds, tops, sums, tiles,
                **flags, **options, num_warps=plan.warps,
            )  # fmt: skip

        sum_tiles(WANTED=model_mask, FILTERED=False)
        if inputs.filtered:
            thresholds = find_thresholds(inputs, tops, sums)
            sum_tiles(WANTED=0, FILTERED=True)
        draw_kernel[(rows,)](
            *arguments.tensors, *arguments.sizes, thresholds, tops, sums, tiles,
            *_draw_arguments(inputs), *sample, rows,
            **flags, WANTED=model_mask, FILTERED=inputs.filtered, HAS_UNIFORMS=inputs.uniforms is not None,
            STREAM=inputs.stream, TILES=max(16, triton.next_power_of_2(tiles)),
            **A_PROGRAM_PER_ROW | {"num_warps": plan.draw_warps},
        )  # fmt: skip
    return sample


def _draw_arguments(inputs: MixtureSampleInputs) -> tuple[torch.Tensor | int, ...]:
    """Return the kernel's arguments from uniforms to step_stride; for absent ones a tensor that is not read."""
    unread = inputs.settings
    seed, row_ids, step = (unread if x is None else x for x in (inputs.seed, inputs.row_ids, inputs.step))
    uniforms = unread if inputs.uniforms is None else inputs.uniforms
    return uniforms, seed, row_ids, step, seed.ndim, step.ndim
