# mypy: ignore-errors
"""The filters of mixture_sample in Triton: one threshold per row; smaller y are masked out. (3)-(5) of README.md.

Top-k asks for the largest x with  #{y >= x} >= k,  top-p for the largest x with  mass{y >= x} >= p mass{y >= top-k's x}
(strictly larger values then have less than p: the same set). Two passes over the logits and a search find them:

    bin_sums    a program per chunk of a row: the tiles' sums, as without filters, and a histogram of y
    bracket     a program per row: the few bins that hold both x, from the bins' counts and bounds of their masses
    gather      a program per chunk: each tile's mass above those bins, and a list of the values in them
    find_threshold, called by the drawing kernel: the floats' bit patterns between the bins' ends, in the floats' order,
                narrowed to a sixteenth per pass over the list; over the row where the list is too short for them

No launch adds atomically: each chunk has its own histogram, from which follows where its values stand in the list. So
every sum has one order, and the list that of the vocabulary, in every run. The bins lie around the values of a sample
of the row. A bad sample, as of a row whose values are nearly all equal or masked, makes the list too short and costs
time, not exactness. Each search ends after eight passes on any input. Rows without top-k and top-p skip it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import (
    combine_tiles,
    exp_of,
    load_elements,
    load_tile,
    load_weights,
    store_sums,
    sum_of,
    temperature_of,
)

_SEGMENTS, _SEGMENT = tl.constexpr(16), tl.constexpr(32)  # of a row's sample
_WINDOW = tl.constexpr(44.0)  # most that the bins span: e^-44 of the mass is none
_CHUNKS = tl.constexpr(16)  # read at a time
_SPLITS = tl.constexpr(16)
_BLOCK = tl.constexpr(1024)  # values by 16 splits: 64 elements a thread with 8 warps


def sample_step(vocabulary: int) -> int:
    """Return the distance of the sample's segments, a multiple of their length."""
    segment, segments = _SEGMENT.value, _SEGMENTS.value
    return max(segment, vocabulary // segments // segment * segment)


@triton.jit
def _window(y, BINS: tl.constexpr):
    """Return the upper end of the bins, and bins per unit of y, for a sample of a row.

    A sixth lies above the sample, whose maximum is below the row's, and a sixth below.
    """
    finite = (y > float("-inf")) & (y < float("inf"))
    highest = tl.max(tl.where(finite, y, float("-inf")), axis=0)
    lowest = tl.min(tl.where(finite, y, float("inf")), axis=0)
    some = highest >= lowest
    window = tl.where(some, tl.minimum(tl.maximum(1.5 * (highest - lowest), 1e-30), _WINDOW), _WINDOW)
    return tl.where(some, highest, 0.0) + window / 6, BINS / window


@triton.jit
def _bin_of(y, origin, per_unit, BINS: tl.constexpr):
    """Return the bin of y, which grows as y falls: rounding is monotone. The first and the last bin have no end."""
    distance = (origin - y) * per_unit
    distance = tl.where(distance > 0, distance, 0.0)  # of NaN, too
    return tl.minimum(distance, BINS - 1.0).to(tl.int32)


@triton.jit
def bin_sums_kernel(
    z0, z1, z2, z3,  # (rows, vocabulary)
    bias,  # (vocabulary,) or (rows, vocabulary)
    settings,  # (rows or 1, 4 + MODELS)
    tops,  # (rows, 1 + MODELS, tiles) float32: as in tile_sums_kernel
    sums,  # (rows, 1 + MODELS, tiles) float64
    windows,  # (rows, 2) float32: see _window
    bins,  # (rows, chunks, BINS) int32: elements other than -inf
    stride0, stride1, stride2, stride3, bias_stride, settings_stride, vocabulary, tiles,
    chunks, step,
    MODELS: tl.constexpr, HAS_BIAS: tl.constexpr, WANTED: tl.constexpr, TILE: tl.constexpr,
    GROUP: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64)
    chunk = program % chunks
    w0, w1, w2, w3 = load_weights(settings, row, settings_stride, MODELS)
    _, to_log2, _ = temperature_of(settings, row, settings_stride)
    lane = tl.arange(0, _SEGMENTS * _SEGMENT)
    sample, _, _, _, _ = load_elements(
        z0, z1, z2, z3, bias, w0, w1, w2, w3, stride0, stride1, stride2, stride3, bias_stride, vocabulary,
        row, 0, lane // _SEGMENT * step + lane % _SEGMENT, MODELS, HAS_BIAS, 0,
    )  # fmt: skip
    origin, per_unit = _window(sample, BINS)
    if chunk == 0:
        tl.store(windows + row * 2, origin)
        tl.store(windows + row * 2 + 1, per_unit)
    bin = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    for tile in range(chunk * GROUP, tl.minimum(chunk * GROUP + GROUP, tiles)):
        y, m0, m1, m2, m3 = load_tile(
            z0, z1, z2, z3, bias, w0, w1, w2, w3, stride0, stride1, stride2, stride3, bias_stride, vocabulary,
            row, tile * TILE, MODELS, HAS_BIAS, WANTED, TILE,
        )  # fmt: skip
        store_sums(y, m0, m1, m2, m3, to_log2, tops, sums, row * (1 + MODELS) * tiles + tile, tiles, WANTED, TILE)
        absent = tl.sum((y == float("-inf")).to(tl.int32), axis=0)
        counts += tl.histogram(_bin_of(y, origin, per_unit, BINS), BINS) - tl.where(bin == BINS - 1, absent, 0)
    tl.store(bins + (row * chunks + chunk) * BINS + bin, counts)


@triton.jit
def _bounds(counts, total, above, per_unit, to_log2, BINS: tl.constexpr):
    """Return bounds of the mass in each bin and those before it, from below and from above.

    A count times the exponentials at a bin's ends bounds the mass up to a bin. So does the row's mass less what the
    later bins hold. Ends are a hundredth of a bin wider, for the rounding of `_bin_of`.
    """
    bin = tl.arange(0, BINS)
    high = tl.where(bin == 0, 0.0, tl.minimum(above - (bin - 0.01) / per_unit, 0.0))
    low = tl.where(bin == BINS - 1, float("-inf"), above - (bin + 1.01) / per_unit)
    most = tl.cumsum(counts * (1.0001 * tl.exp2(high * to_log2)).to(tl.float64), axis=0)
    least = tl.cumsum(counts * (0.9999 * tl.exp2(low * to_log2)).to(tl.float64), axis=0)
    later_most = tl.max(most, axis=0) - most
    later_least = tl.max(least, axis=0) - least
    return tl.maximum(least, total * (1 - 1e-5) - later_most), tl.minimum(most, total * (1 + 1e-5) - later_least)


@triton.jit
def _bins_with(counts, k, p, total, above, per_unit, to_log2, BINS: tl.constexpr):
    """Return the first and the last bin in which the thresholds may lie, and whether there is one of top-k.

    With top-k alone both are the bin of the k-th largest; there is none where fewer than k elements are above -inf.
    """
    bin = tl.arange(0, BINS)
    least, most = _bounds(counts, total, above, per_unit, to_log2, BINS)
    reached = tl.where(k > 0, tl.cumsum(counts, axis=0) >= k.to(tl.int32), False)
    bin_of_k = tl.min(tl.where(reached, bin, BINS), axis=0)
    by_count = bin_of_k < BINS
    # Top-k leaves top-p a mass between these two; without top-k, all of it.
    left_least = tl.where(by_count, tl.sum(tl.where(bin == bin_of_k - 1, least, 0.0), axis=0), total * (1 - 1e-5))
    left_most = tl.where(by_count, tl.sum(tl.where(bin == bin_of_k, most, 0.0), axis=0), total * (1 + 1e-5))
    share = p.to(tl.float64)
    first_of_p = tl.min(tl.where(most >= share * left_least, bin, BINS - 1), axis=0)
    last_of_p = tl.min(tl.where(least >= share * left_most, bin, BINS - 1), axis=0)
    first = tl.where(p < 1, tl.minimum(first_of_p, bin_of_k), bin_of_k)
    return first, tl.where(by_count, bin_of_k, last_of_p), by_count


@triton.jit
def bracket_kernel(
    z0, z1, z2, z3, bias,  # not read
    settings,  # (rows or 1, 4 + MODELS)
    tops, sums, windows, bins,  # as in bin_sums_kernel
    states,  # (rows, 8) float64: the row's maximum, first and last bin, number of elements in these bins and before
             # them, whether top-k and top-p are searched, min-p's threshold or -inf
    offsets,  # (rows, chunks) int32: the elements in these bins in earlier chunks
    stride0, stride1, stride2, stride3, bias_stride, settings_stride, vocabulary, tiles,
    chunks,
    MODELS: tl.constexpr, BINS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    here = tile < tiles
    slot = row * (1 + MODELS) * tiles + tile
    tile_tops = tl.load(tops + slot, mask=here, other=float("-inf"))
    tile_sums = tl.load(sums + slot, mask=here, other=0.0)
    temperature, to_log2, greedy = temperature_of(settings, row, settings_stride)
    own = settings + row * settings_stride
    k, p, min_p = tl.load(own + 1), tl.load(own + 2), tl.load(own + 3)
    origin, per_unit = tl.load(windows + row * 2), tl.load(windows + row * 2 + 1)
    bin = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    line = tl.arange(0, _CHUNKS)
    for first_chunk in range(0, chunks, _CHUNKS):
        chunk = first_chunk + line
        of_chunk = bins + (row * chunks + chunk[:, None]) * BINS + bin[None, :]
        counts += tl.sum(tl.load(of_chunk, mask=(chunk < chunks)[:, None] & (bin >= 0)[None, :], other=0), axis=0)

    top, masses = combine_tiles(tile_tops, tile_sums, to_log2)
    total = tl.sum(masses, axis=0)
    searched = (total > 0) & (total < float("inf")) & (greedy == 0)
    k = tl.where(searched & (k > 0) & (k < vocabulary), k, 0.0)
    p = tl.where(searched & (p < 1), p, 1.0)
    least = tl.where(min_p < 1, top + temperature * tl.log(min_p), top)
    first, last, by_count = _bins_with(counts, k, p, total, origin - top, per_unit, to_log2, BINS)
    # Where min-p's threshold lies above those bins, it alone decides.
    decided = (least > float("-inf")) & (_bin_of(least, origin, per_unit, BINS) < first)
    by_count = by_count & (decided == 0)
    by_mass = (p < 1) & (decided == 0)
    inside = (bin >= first) & (bin <= last) & (by_count | by_mass)
    state = states + row * 8
    tl.store(state, top)
    tl.store(state + 1, first)
    tl.store(state + 2, last)
    tl.store(state + 3, tl.sum(tl.where(inside, counts, 0), axis=0))
    tl.store(state + 4, tl.sum(tl.where(bin < first, counts, 0), axis=0))
    tl.store(state + 5, by_count)
    tl.store(state + 6, by_mass)
    tl.store(state + 7, least)
    earlier = 0
    for first_chunk in range(0, chunks, _CHUNKS):
        chunk = first_chunk + line
        of_chunk = bins + (row * chunks + chunk[:, None]) * BINS + bin[None, :]
        taken = tl.load(of_chunk, mask=(chunk < chunks)[:, None] & inside[None, :], other=0)
        taken = tl.sum(taken, axis=1)
        tl.store(offsets + row * chunks + chunk, earlier + tl.cumsum(taken, axis=0) - taken, mask=chunk < chunks)
        earlier += tl.sum(taken, axis=0)


@triton.jit
def gather_kernel(
    z0, z1, z2, z3, bias, settings,  # as in bin_sums_kernel
    tops, sums, windows, bins, states, offsets,  # as in bracket_kernel
    kept,  # (rows, tiles) float64: the mass above the bins of the thresholds, or above a known threshold
    starts,  # (rows, tiles) int32: how many values of the list belong to earlier tiles
    values,  # (rows, LIST) float32: the list
    stride0, stride1, stride2, stride3, bias_stride, settings_stride, vocabulary, tiles,
    chunks,
    MODELS: tl.constexpr, HAS_BIAS: tl.constexpr, TILE: tl.constexpr,
    GROUP: tl.constexpr, BINS: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64)
    chunk = program % chunks
    state = states + row * 8
    top, first, last = tl.load(state).to(tl.float32), tl.load(state + 1).to(tl.int32), tl.load(state + 2).to(tl.int32)
    searched = (tl.load(state + 5) + tl.load(state + 6)) > 0
    least = tl.load(state + 7).to(tl.float32)
    origin, per_unit = tl.load(windows + row * 2), tl.load(windows + row * 2 + 1)
    start = tl.load(offsets + row * chunks + chunk)
    w0, w1, w2, w3 = load_weights(settings, row, settings_stride, MODELS)
    _temperature, to_log2, _greedy = temperature_of(settings, row, settings_stride)
    for tile in range(chunk * GROUP, tl.minimum(chunk * GROUP + GROUP, tiles)):
        slot = row * (1 + MODELS) * tiles + tile
        tile_top, mass = tl.load(tops + slot), tl.load(sums + slot)
        tl.store(starts + row * tiles + tile, start)
        if searched | (least > float("-inf")):  # otherwise everything is kept
            mass = 0.0 * mass
            reached = tl.where(searched, _bin_of(tile_top, origin, per_unit, BINS) <= last, tile_top >= least)
            if reached:
                y, _, _, _, _ = load_tile(
                    z0, z1, z2, z3, bias, w0, w1, w2, w3, stride0, stride1, stride2, stride3, bias_stride, vocabulary,
                    row, tile * TILE, MODELS, HAS_BIAS, 0, TILE,
                )  # fmt: skip
                bin = _bin_of(y, origin, per_unit, BINS)
                above = tl.where(searched, bin < first, y >= least)
                mass = sum_of(tl.where(above, exp_of(y, tile_top, to_log2), 0.0), TILE)
                taken = tl.where(searched, (bin >= first) & (bin <= last) & (y > float("-inf")), False)
                place = start + tl.cumsum(taken.to(tl.int32), axis=0) - 1
                tl.store(values + row * LIST + place, y, mask=taken & (place < LIST))
                start += tl.sum(taken.to(tl.int32), axis=0)
        tl.store(kept + row * tiles + tile, mass * exp_of(tile_top, top, to_log2).to(tl.float64))


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
def _block(
    first, values, n, listed,
    z0, z1, z2, z3, bias, w0, w1, w2, w3, stride0, stride1, stride2, stride3, bias_stride, vocabulary,
    row, origin, per_unit, first_bin, last_bin, MODELS: tl.constexpr, HAS_BIAS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Return a block of the list's n values, from `first` on, or of the row's: NaN for those outside of the bins."""
    lane = tl.arange(0, _BLOCK)
    if listed:
        y = tl.load(values + first + lane, mask=lane < n - first, other=float("nan"))
    else:
        y, _, _, _, _ = load_elements(
            z0, z1, z2, z3, bias, w0, w1, w2, w3, stride0, stride1, stride2, stride3, bias_stride, vocabulary,
            row, first, lane, MODELS, HAS_BIAS, 0,
        )  # fmt: skip
        bin = _bin_of(y, origin, per_unit, BINS)
        y = tl.where((bin >= first_bin) & (bin <= last_bin) & (y > float("-inf")), y, float("nan"))
    return y


@triton.jit
def find_threshold(
    values, listed, states, windows, top, total, mass_above, p, k, to_log2,
    z0, z1, z2, z3, bias, w0, w1, w2, w3, stride0, stride1, stride2, stride3, bias_stride, vocabulary,
    row, MODELS: tl.constexpr, HAS_BIAS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Return the largest x of (3) and (4): what a row's elements must reach to be kept by top-k and top-p.

    Each pass takes the mass or the count at or above 16 keys between `low`, which is enough, and `high`, which is not.
    The first finds the smallest and the largest value, so that equal values need no more. Top-k's x is the smallest
    that top-p's can be.
    """
    state = states + row * 8
    first_bin, last_bin = tl.load(state + 1).to(tl.int32), tl.load(state + 2).to(tl.int32)
    n, count_above = tl.load(state + 3).to(tl.int32), tl.load(state + 4)
    by_count, by_share = tl.load(state + 5) > 0, tl.load(state + 6) > 0
    origin, per_unit = tl.load(windows + row * 2), tl.load(windows + row * 2 + 1)
    size = tl.where(listed, n, vocabulary)
    split = tl.arange(0, _SPLITS).to(tl.int64)
    low = tl.zeros((), tl.int64)
    high, end = low, low
    target = tl.zeros((), tl.float64)
    above = target
    # Phases: 0 extent, 1 top-k, 2 the mass that top-k leaves, 3 top-p. One loop serves them, so that its registers are
    # allocated once.
    phase = tl.zeros((), tl.int32)
    while phase < 4:
        keys = low + (((high - low) * split) >> 4)  # the first is `low`; every key once high - low <= 16
        x = _value(keys)
        by_mass = phase > 1
        reached = tl.zeros((_SPLITS,), tl.float64)
        least = tl.full((), float("inf"), tl.float32)
        largest = tl.full((), float("-inf"), tl.float32)
        for first in range(0, size, _BLOCK):
            y = _block(
                first, values, n, listed,
                z0, z1, z2, z3, bias, w0, w1, w2, w3, stride0, stride1, stride2, stride3, bias_stride, vocabulary,
                row, origin, per_unit, first_bin, last_bin, MODELS, HAS_BIAS, BINS,
            )  # fmt: skip
            if phase == 0:
                least = tl.minimum(least, tl.min(tl.where(y == y, y, float("inf")), axis=0))
                largest = tl.maximum(largest, tl.max(tl.where(y == y, y, float("-inf")), axis=0))
            else:
                e = tl.where(by_mass, exp_of(y, top, to_log2), 1.0)
                reached += tl.sum(tl.where(y[:, None] >= x[None, :], e[:, None], 0.0), axis=0).to(tl.float64)
        if phase == 0:
            low = _key(least).to(tl.int64)
            end = _key(largest).to(tl.int64) + 1
            high = end
            target = tl.where(by_count, k.to(tl.float64), p.to(tl.float64) * total)
            above = tl.where(by_count, count_above, mass_above)
            phase = tl.where(by_count, 1, 3)
        elif phase == 2:
            high = end
            target = p.to(tl.float64) * (mass_above + tl.max(reached, axis=0))
            above = mass_above
            phase = phase + 1
        else:
            enough = above + reached >= target
            next_high = tl.min(tl.where(enough | (keys == low), high, keys), axis=0)
            low = tl.max(tl.where(enough, keys, low), axis=0)
            high = next_high
        found = high - low <= 1
        phase = tl.where((phase == 1) & found, tl.where(by_share, 2, 4), phase)
        phase = tl.where((phase == 3) & found, 4, phase)
    return tl.minimum(_value(low), top)


@triton.jit
def masses_of_bins(
    values, listed, starts, states, windows, top, threshold, to_log2, tiles,
    z0, z1, z2, z3, bias, w0, w1, w2, w3, stride0, stride1, stride2, stride3, bias_stride, vocabulary,
    row, MODELS: tl.constexpr, HAS_BIAS: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Return for each tile (TILES,) the mass of its elements in the bins that reach the threshold.

    The list is overwritten: by sums up to each value, of which a tile's mass is a difference.
    """
    state = states + row * 8
    n = tl.load(state + 3).to(tl.int32)
    tile = tl.arange(0, TILES)
    here = tile < tiles
    result = tl.zeros((TILES,), tl.float64)
    if listed:
        lane = tl.arange(0, _BLOCK)
        before = tl.zeros((), tl.float64)
        for first in range(0, n, _BLOCK):
            inside = lane < n - first
            y = tl.load(values + first + lane, mask=inside, other=float("-inf"))
            e = tl.where(inside & (y >= threshold), exp_of(y, top, to_log2), 0.0).to(tl.float64)
            tl.store(values + first + lane, (before + tl.cumsum(e, axis=0)).to(tl.float32), mask=inside)
            before += tl.sum(e, axis=0)
        begin = tl.load(starts + row * tiles + tile, mask=here, other=0)
        end = tl.load(starts + row * tiles + tile + 1, mask=tile + 1 < tiles, other=0)
        end = tl.where(tile + 1 == tiles, n, end)
        tl.debug_barrier()  # other threads of the program wrote what this one reads
        result = tl.load(values + end - 1, mask=here & (end > begin), other=0.0).to(tl.float64)
        result -= tl.load(values + begin - 1, mask=here & (end > begin) & (begin > 0), other=0.0).to(tl.float64)
    else:
        first_bin, last_bin = tl.load(state + 1).to(tl.int32), tl.load(state + 2).to(tl.int32)
        origin, per_unit = tl.load(windows + row * 2), tl.load(windows + row * 2 + 1)
        for each in range(tiles):
            y, _, _, _, _ = load_tile(
                z0, z1, z2, z3, bias, w0, w1, w2, w3, stride0, stride1, stride2, stride3, bias_stride, vocabulary,
                row, each * TILE, MODELS, HAS_BIAS, 0, TILE,
            )  # fmt: skip
            bin = _bin_of(y, origin, per_unit, BINS)
            kept = (bin >= first_bin) & (bin <= last_bin) & (y >= threshold)
            mass = sum_of(tl.where(kept, exp_of(y, top, to_log2), 0.0), TILE)
            result += tl.where(tile == each, mass, 0.0)
    return result
