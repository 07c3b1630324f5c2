# mypy: ignore-errors
"""The filters of mixture_sample in Triton: one threshold per row; smaller y are masked out. (3)-(5) of README.md.

Top-k asks for the largest x with  #{y >= x} >= k,  top-p for the largest x with  mass{y >= x} >= p mass{y >= top-k's x}
(strictly larger values then have less than p: the same set). Both functions decrease in x, so x is found by search:

    count    a program per chunk of a row: count and mass at or above each of eight pivots, whose sums over the row
             bracket x between two pivots; done twice, the second time with pivots inside the bracket
    gather   a program per chunk: the values inside the last bracket, compacted
    search   a program per row: the 2^32 bit patterns of a float, in the floats' order, narrowed to a sixteenth per pass

The first pivots are guessed from the tiles' sums. A bad guess costs time, as more values are gathered (at worst all),
and does not change the result. The search ends after eight passes on any input. Rows without top-k and top-p skip it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .layout import MixtureSampleInputs
from .triton_tiles import (
    A_PROGRAM_PER_ROW,
    combine_tiles,
    exp_of,
    kernel_arguments,
    kernel_tensors,
    load_tile,
    load_weights,
    sum_of,
    temperature_of,
)

_ROUNDS = tl.constexpr(2)  # of counting: of Gaussian logits at any scale a tenth or far less is left to the search
_PIVOTS = tl.constexpr(8)
_SPLITS = tl.constexpr(16)
_COLUMNS = tl.constexpr(8)  # floor, upper, spacing, upper's index, values inside, count and mass above, row's mass
_CHUNK = 4096  # with 4 warps 32 elements a thread: a pivot's reductions cost less than its comparisons
_MAX_CHUNKS = 256  # per row, which one program sums; beyond a million tokens the chunks grow instead
_BLOCK = 1024  # gathered values by 16 splits: 64 elements a thread with 8 warps


@triton.jit
def _task(tops, sums, settings, row, settings_stride, vocabulary, tiles, SLOTS: tl.constexpr, TILES: tl.constexpr):
    """Return a row's maximum, top-k's k or 0, top-p's p or 1, and the spacing of the first pivots.

    Greedy rows and rows without a valid distribution have k = 0 and p = 1.
    """
    temperature, to_log2, greedy = temperature_of(settings, row, settings_stride)
    tile = tl.arange(0, TILES)
    here = tile < tiles
    tile_tops = tl.load(tops + row * SLOTS * tiles + tile, mask=here, other=float("-inf"))
    top, masses = combine_tiles(tile_tops, tl.load(sums + row * SLOTS * tiles + tile, mask=here, other=0.0), to_log2)
    total = tl.sum(masses, axis=0)
    searched = (total > 0) & (total < float("inf")) & (greedy == 0)
    k = tl.load(settings + row * settings_stride + 1)
    k = tl.where(searched & (k > 0) & (k < vocabulary), k, 0.0)
    p = tl.load(settings + row * settings_stride + 2)
    p = tl.where(searched & (p < 1), p, 1.0)
    # Tokens with less than (1 - p) / V of the mass each have less than 1 - p together: the nucleus ends above them. The
    # k-th largest value is at least the smallest of the tiles' maxima if there are k tiles; with fewer, guess deeper.
    nucleus = -temperature * tl.log(((1 - p) * total / vocabulary).to(tl.float32))
    deepest = top - tl.min(tl.where(tile_tops > float("-inf"), tile_tops, float("inf")), axis=0)
    depth = tl.where(k > 0, tl.where(k <= tiles, deepest, 4 * deepest), nucleus)
    return top, k, p, depth / _PIVOTS


@triton.jit
def _pivot(upper, floor, spacing, j):
    """Return pivot j. Pivots decrease with j and end at the floor."""
    return tl.where(j == _PIVOTS - 1, floor, tl.maximum(upper - (j + 1.0) * spacing, floor))


@triton.jit
def _narrow(counts, masses, chunks, k, p, count_above, mass_above, whole, CHUNKS: tl.constexpr):
    """Return the pivots that bracket every requested x, low <= x < high; high = -1 keeps the bracket's upper end.

    The inputs are one round's counts and masses, (_PIVOTS, chunks), and the count and mass at or above the old upper
    end. Also returned: the count at or above `low`, the count and mass at or above `high`, and the row's mass.
    """
    pivot = tl.arange(0, _PIVOTS)
    chunk = tl.arange(0, CHUNKS)
    slot = pivot[:, None] * chunks + chunk[None, :]
    here = (pivot[:, None] >= 0) & (chunk[None, :] < chunks)
    count = tl.sum(tl.load(counts + slot, mask=here, other=0), axis=1)
    mass = tl.sum(tl.load(masses + slot, mask=here, other=0.0), axis=1)
    whole = tl.where(whole >= 0, whole, tl.sum(tl.where(pivot == _PIVOTS - 1, mass, 0.0), axis=0))
    # Top-k's x lies between the first pivot with k values and the pivot above it. So top-k leaves top-p a mass between
    # `least` and `most`, which bracket top-p's x; without top-k, the whole mass is left.
    low_k = tl.min(tl.where(count >= k, pivot, _PIVOTS - 1), axis=0)
    above_k = tl.where(low_k > 0, tl.sum(tl.where(pivot == low_k - 1, mass, 0.0), axis=0), mass_above)
    most = tl.where(k > 0, tl.sum(tl.where(pivot == low_k, mass, 0.0), axis=0), whole)
    least = tl.where(k > 0, above_k, whole)
    share = p.to(tl.float64)
    low_p = tl.min(tl.where(mass >= share * most, pivot, _PIVOTS - 1), axis=0)
    high_p = tl.max(tl.where(mass < share * least, pivot, -1), axis=0)
    low = tl.where(k > 0, low_k, low_p)
    high = tl.where(p < 1, high_p, low_k - 1)
    reach_low = tl.sum(tl.where(pivot == low, count, 0), axis=0)
    count_above = tl.where(high >= 0, tl.sum(tl.where(pivot == high, count, 0), axis=0), count_above)
    mass_above = tl.where(high >= 0, tl.sum(tl.where(pivot == high, mass, 0.0), axis=0), mass_above)
    return low, high, reach_low, count_above, mass_above, whole


@triton.jit
def _bracket(
    counts, masses, brackets, chunks, row, chunk, top, k, p, spacing, ROUND: tl.constexpr, CHUNKS: tl.constexpr
):
    """Return the bracket after ROUND rounds: floor <= x < upper for every requested x, the next pivots' spacing, and
    the indices of the counts at floor and upper (-1: upper is +inf).

    The launch that first computes a bracket stores it for later launches: kernels that sum the same numbers in
    different orders may differ in the last bit, and so choose different pivots.
    """
    floor = tl.minimum(top, float("-inf"))
    upper = tl.maximum(top, float("inf"))
    floor_at, upper_at, count_above, mass_above, whole = 0, -1, 0, 0.0, -1.0
    if ROUND > 1:
        last = brackets + (row * _ROUNDS + ROUND - 2) * _COLUMNS
        floor, upper = tl.load(last).to(tl.float32), tl.load(last + 1).to(tl.float32)
        spacing, upper_at = tl.load(last + 2).to(tl.float32), tl.load(last + 3).to(tl.int32)
        count_above, mass_above, whole = tl.load(last + 5).to(tl.int32), tl.load(last + 6), tl.load(last + 7)
    if ROUND > 0:
        table = (row * _ROUNDS + ROUND - 1) * _PIVOTS * chunks
        low, high, reach_low, count_above, mass_above, whole = _narrow(
            counts + table, masses + table, chunks, k, p, count_above, mass_above, whole, CHUNKS
        )
        start, old_floor = tl.minimum(upper, top), floor
        floor = _pivot(start, old_floor, spacing, low)
        upper = tl.where(high >= 0, _pivot(start, old_floor, spacing, high), upper)
        floor_at = (ROUND - 1) * _PIVOTS + low
        upper_at = tl.where(high >= 0, (ROUND - 1) * _PIVOTS + high, upper_at)
        bounded = floor > float("-inf")
        spacing = tl.where(bounded, (tl.minimum(upper, top) - floor) / _PIVOTS, _PIVOTS * spacing)
        if chunk == 0:
            new = brackets + (row * _ROUNDS + ROUND - 1) * _COLUMNS
            tl.store(new, floor)
            tl.store(new + 1, upper)
            tl.store(new + 2, spacing)
            tl.store(new + 3, upper_at)
            tl.store(new + 4, reach_low - count_above)
            tl.store(new + 5, count_above)
            tl.store(new + 6, mass_above)
            tl.store(new + 7, whole)
    return floor, upper, spacing, floor_at, upper_at


@triton.jit
def count_kernel(
    z0, z1, z2, z3,  # (rows, vocabulary)
    bias,  # (vocabulary,) or (rows, vocabulary)
    settings,  # (rows or 1, 4 + MODELS)
    stride0, stride1, stride2, stride3, bias_stride, settings_stride, vocabulary,
    tops,  # (rows, tiles, 1 + MODELS) float32
    sums,  # (rows, tiles, 1 + MODELS) float64
    tiles,
    tasks,  # (rows, 4) float32: see _task
    brackets,  # (rows, _ROUNDS, _COLUMNS) float64: see _bracket
    counts,  # (rows, _ROUNDS, _PIVOTS, chunks) int32: values at or above each pivot
    masses,  # (rows, _ROUNDS, _PIVOTS, chunks) float64: their exp(y - the row's maximum)
    chunks,
    MODELS: tl.constexpr, HAS_BIAS: tl.constexpr, CHUNK: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64)
    chunk = program % chunks
    task = tasks + row * 4
    if ROUND == 0:
        top, k, p, spacing = _task(tops, sums, settings, row, settings_stride, vocabulary, tiles, 1 + MODELS, TILES)
        if chunk == 0:
            tl.store(task, top)
            tl.store(task + 1, k)
            tl.store(task + 2, p)
            tl.store(task + 3, spacing)
    else:
        top, k, p, spacing = tl.load(task), tl.load(task + 1), tl.load(task + 2), tl.load(task + 3)
    if (k == 0) & (p == 1):
        return
    floor, upper, spacing, _, _ = _bracket(
        counts, masses, brackets, chunks, row, chunk, top, k, p, spacing, ROUND, CHUNKS
    )
    _, to_log2, _ = temperature_of(settings, row, settings_stride)
    w0, w1, w2, w3 = load_weights(settings, row, settings_stride, MODELS)
    y, _, _, _, _ = load_tile(
        z0, z1, z2, z3, bias, w0, w1, w2, w3, stride0, stride1, stride2, stride3, bias_stride, vocabulary,
        row, chunk * CHUNK, MODELS, HAS_BIAS, 0, CHUNK,
    )  # fmt: skip
    e = exp_of(y, top, to_log2)
    inside = tl.arange(0, CHUNK) < vocabulary - chunk * CHUNK
    y = tl.where(inside, y, float("nan"))  # NaN reaches no pivot; -inf would reach a pivot of -inf
    for j in tl.static_range(_PIVOTS):
        reached = y >= _pivot(tl.minimum(upper, top), floor, spacing, j)
        slot = ((row * _ROUNDS + ROUND) * _PIVOTS + j) * chunks + chunk
        tl.store(counts + slot, tl.sum(reached.to(tl.int32), axis=0))
        tl.store(masses + slot, sum_of(tl.where(reached, e, 0.0), CHUNK))


@triton.jit
def gather_kernel(
    z0, z1, z2, z3,  # (rows, vocabulary)
    bias,  # (vocabulary,) or (rows, vocabulary)
    settings,  # (rows or 1, 4 + MODELS)
    stride0, stride1, stride2, stride3, bias_stride, settings_stride, vocabulary,
    tasks, brackets, counts, masses, chunks,  # as in count_kernel
    gathered,  # (rows, vocabulary) float32
    MODELS: tl.constexpr, HAS_BIAS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64)
    own = program % chunks
    task = tasks + row * 4
    top, k, p, spacing = tl.load(task), tl.load(task + 1), tl.load(task + 2), tl.load(task + 3)
    if (k == 0) & (p == 1):
        return
    floor, upper, _, floor_at, upper_at = _bracket(
        counts, masses, brackets, chunks, row, own, top, k, p, spacing, _ROUNDS, CHUNKS
    )
    # The chunk's offset follows from the counts: values are gathered in the vocabulary's order in every run.
    chunk = tl.arange(0, CHUNKS)
    of_row = counts + row * _ROUNDS * _PIVOTS * chunks + chunk
    before = tl.load(of_row + floor_at * chunks, mask=chunk < own, other=0)
    before -= tl.load(of_row + upper_at * chunks, mask=chunk < tl.where(upper_at < 0, 0, own), other=0)
    w0, w1, w2, w3 = load_weights(settings, row, settings_stride, MODELS)
    y, _, _, _, _ = load_tile(
        z0, z1, z2, z3, bias, w0, w1, w2, w3, stride0, stride1, stride2, stride3, bias_stride, vocabulary,
        row, own * CHUNK, MODELS, HAS_BIAS, 0, CHUNK,
    )  # fmt: skip
    inside = tl.arange(0, CHUNK) < vocabulary - own * CHUNK
    y = tl.where(inside, y, float("nan"))
    taken = (y >= floor) & (y < upper)
    place = tl.sum(before, axis=0) + tl.cumsum(taken.to(tl.int32), axis=0) - 1
    tl.store(gathered + row * vocabulary + place, y, mask=taken)


@triton.jit
def _key(y):
    """Map a float to an int32 in the floats' order (-0 just below 0); on the bits the map is its own inverse."""
    bits = y.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _reach(values, n, x, top, to_log2, by_mass, BLOCK: tl.constexpr):
    """Return for each of x (_SPLITS,) the count or mass of the n gathered values >= x; float64 over blocks."""
    reached = tl.zeros((_SPLITS,), tl.float64)
    lane = tl.arange(0, BLOCK)
    for first in range(0, n, BLOCK):
        y = tl.load(values + first + lane, mask=lane < n - first, other=float("nan"))  # NaN reaches nothing
        e = tl.where(by_mass, exp_of(y, top, to_log2), 1.0)
        reached += tl.sum(tl.where(y[:, None] >= x[None, :], e[:, None], 0.0), axis=0).to(tl.float64)
    return reached


@triton.jit
def _search(values, n, low, high, above, target, top, to_log2, by_mass, BLOCK: tl.constexpr):
    """Return the largest key in [low, high) with `above` plus the gathered values from it on >= `target`; else low."""
    split = tl.arange(0, _SPLITS).to(tl.int64)
    while high - low > 1:
        keys = low + (((high - low) * split) >> 4)  # the first is `low`; every key once high - low <= 16
        enough = above + _reach(values, n, _value(keys), top, to_log2, by_mass, BLOCK) >= target
        next_high = tl.min(tl.where(enough | (keys == low), high, keys), axis=0)
        low = tl.max(tl.where(enough, keys, low), axis=0)
        high = next_high
    return low


@triton.jit
def _extent(values, n, BLOCK: tl.constexpr):
    """Return the least and the largest of the n gathered values."""
    lane = tl.arange(0, BLOCK)
    least = tl.full((BLOCK,), float("inf"), tl.float32)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for first in range(0, n, BLOCK):
        inside = lane < n - first
        least = tl.minimum(least, tl.load(values + first + lane, mask=inside, other=float("inf")))
        largest = tl.maximum(largest, tl.load(values + first + lane, mask=inside, other=float("-inf")))
    return tl.min(least, axis=0), tl.max(largest, axis=0)


@triton.jit
def search_kernel(
    settings,  # (rows or 1, 4 + MODELS)
    settings_stride,
    vocabulary,
    tasks, brackets, gathered,  # as in gather_kernel
    thresholds,  # (rows,) float32: smaller values are masked out
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    top, k, p = tl.load(tasks + row * 4), tl.load(tasks + row * 4 + 1), tl.load(tasks + row * 4 + 2)
    temperature, to_log2, _ = temperature_of(settings, row, settings_stride)
    min_p = tl.load(settings + row * settings_stride + 3)
    threshold = tl.where(min_p < 1, top + temperature * tl.log(min_p), top)
    if (k > 0) | (p < 1):
        bracket = brackets + (row * _ROUNDS + _ROUNDS - 1) * _COLUMNS
        n, count_above = tl.load(bracket + 4).to(tl.int32), tl.load(bracket + 5)
        mass_above, whole = tl.load(bracket + 6), tl.load(bracket + 7)
        values = gathered + row * vocabulary
        least, largest = _extent(values, n, BLOCK)
        low = _key(least).to(tl.int64)
        end = _key(largest).to(tl.int64) + 1
        for phase in range(2):  # top-k, then top-p; one loop body, so that its registers are allocated once
            by_mass = phase == 1
            x = tl.zeros((_SPLITS,), tl.float32) + _value(low)
            counted = tl.where(by_mass & (k > 0), n, 0)
            left = mass_above + tl.max(_reach(values, counted, x, top, to_log2, by_mass, BLOCK), axis=0)
            target = tl.where(by_mass, p.to(tl.float64) * tl.where(k > 0, left, whole), k.to(tl.float64))
            above = tl.where(by_mass, mass_above, count_above)
            high = tl.where(tl.where(by_mass, p < 1, k > 0), end, low)
            low = _search(values, n, low, high, above, target, top, to_log2, by_mass, BLOCK)
        threshold = tl.maximum(threshold, _value(low))
    tl.store(thresholds + row, threshold)


def find_thresholds(inputs: MixtureSampleInputs, tops: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Return thresholds (rows,) float32, from the sums of the unfiltered tiles."""
    device, rows, vocabulary, tiles = tops.device, inputs.rows, inputs.vocabulary, tops.shape[2]
    arguments, tensors = kernel_arguments(inputs), kernel_tensors(inputs)
    width = max(256, min(_CHUNK, triton.next_power_of_2(vocabulary)))
    width = max(width, triton.next_power_of_2(triton.cdiv(vocabulary, _MAX_CHUNKS)))
    chunks = triton.cdiv(vocabulary, width)
    table = (rows, _ROUNDS.value, _PIVOTS.value, chunks)
    counts = torch.empty(table, dtype=torch.int32, device=device)
    masses = torch.empty(table, dtype=torch.float64, device=device)
    gathered = torch.empty((rows, vocabulary), dtype=torch.float32, device=device)
    thresholds = torch.empty(rows, dtype=torch.float32, device=device)
    tasks = torch.empty((rows, 4), dtype=torch.float32, device=device)
    brackets = torch.empty((rows, _ROUNDS.value, _COLUMNS.value), dtype=torch.float64, device=device)
    settings_stride = inputs.settings.stride(0) if inputs.settings.shape[0] > 1 else 0
    tables = (tasks, brackets, counts, masses, chunks)
    flags = {**arguments.flags, "CHUNK": width, "CHUNKS": max(16, triton.next_power_of_2(chunks))}
    flags["num_warps"] = min(16, max(4, width // 1024))
    wide = max(16, triton.next_power_of_2(tiles))
    for round_ in range(_ROUNDS.value):
        count_kernel[(rows * chunks,)](
            *tensors, *arguments.sizes, tops, sums, tiles, *tables, **flags, TILES=wide, ROUND=round_
        )  # fmt: skip
    gather_kernel[(rows * chunks,)](*tensors, *arguments.sizes, *tables, gathered, **flags)
    search_kernel[(rows,)](
        inputs.settings, settings_stride, vocabulary, tasks, brackets, gathered, thresholds,
        BLOCK=_BLOCK, enable_fp_fusion=False, **A_PROGRAM_PER_ROW,
    )  # fmt: skip
    return thresholds
