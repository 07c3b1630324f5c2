# mypy: ignore-errors
"""What the Triton kernels of mixture_sample share: a tile of the mixture, its exponentials, a row's (max, sum).

Kernels work on y = sum_m w_m z_m + bias, before the temperature: (y - max y) / t rounds once less than y / t - max.
The kernel that sums a tile and the one that draws from it must compute bitwise equal values. So y and exp are computed
by these functions only, and every launch disables multiply-add fusion, which could be placed differently in each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .layout import MixtureSampleInputs

LOG2_E = tl.constexpr(1.4426950408889634)
#: Launches with one program per row are bound by memory latency, so they get many warps. Their programs are too few to
#: share a multiprocessor, but without a limit ptxas saves registers for that, and spills.
A_PROGRAM_PER_ROW = {"num_warps": 8, "maxnreg": 192}
_LANES = tl.constexpr(8)  # elements summed in float32 before float64: a dominant token absorbs 7 others at most


class KernelArguments(NamedTuple):
    """The arguments that all kernels share and that calls of one signature share, in the kernels' order."""

    sizes: tuple[int, ...]  # the row strides of all these; vocabulary
    flags: dict[str, Any]  # constexpr arguments of every kernel, and the option that all launches share


def kernel_tensors(inputs: Any) -> tuple[Any, ...]:
    """Return four models, of which the absent ones repeat the first; bias; settings.

    Args:
        inputs (MixtureSampleInputs): of tensors or of Slots.
    """
    logits, settings, bias = inputs.logits, inputs.settings, inputs.bias
    first = logits[0]
    return (*logits, *(first,) * (4 - len(logits)), settings if bias is None else bias, settings)


def kernel_arguments(inputs: MixtureSampleInputs) -> KernelArguments:
    settings, bias = inputs.settings, inputs.bias
    tensors = kernel_tensors(inputs)
    strides = [model.stride(0) for model in tensors[:4]]
    strides.append(bias.stride(0) if bias is not None and bias.ndim == 2 else 0)
    strides.append(settings.stride(0) if settings.shape[0] > 1 else 0)
    flags = {"MODELS": len(inputs.logits), "HAS_BIAS": bias is not None, "enable_fp_fusion": False}
    return KernelArguments((*strides, inputs.vocabulary), flags)


@triton.jit
def load_weights(settings, row, settings_stride, MODELS: tl.constexpr):
    """Load the models' weights; those of absent models repeat the first."""
    weights = settings + row * settings_stride + 4
    w0 = tl.load(weights)
    w1 = w0
    w2 = w0
    w3 = w0
    if MODELS > 1:
        w1 = tl.load(weights + 1)
    if MODELS > 2:
        w2 = tl.load(weights + 2)
    if MODELS > 3:
        w3 = tl.load(weights + 3)
    return w0, w1, w2, w3


@triton.jit
def _load(z, lane, length, weight, WANTED: tl.constexpr):
    """Load one model as float32. With weight 0 and no log-probability wanted, it is not read."""
    if not WANTED:
        length = tl.where(weight == 0, 0, length)
    return tl.load(z + lane, mask=lane < length, other=float("-inf")).to(tl.float32)


@triton.jit
def _weighted(z, weight):
    return tl.where(weight == 0, 0.0, weight * z)  # 0 * -inf is NaN


@triton.jit
def load_elements(
    z0, z1, z2, z3, bias, w0, w1, w2, w3, stride0, stride1, stride2, stride3, bias_stride, vocabulary,
    row, start, lane, MODELS: tl.constexpr, HAS_BIAS: tl.constexpr, WANTED: tl.constexpr,
):  # fmt: skip
    """Load y at start + lane, -inf beyond the vocabulary, and the logits of the models that WANTED names."""
    length = vocabulary - start
    inside = lane < length
    m0 = _load(z0 + row * stride0 + start, lane, length, w0, WANTED & 1)
    m1 = m0
    m2 = m0
    m3 = m0
    # All loads precede the first use, so that their latencies overlap.
    if MODELS > 1:
        m1 = _load(z1 + row * stride1 + start, lane, length, w1, WANTED & 2)
    if MODELS > 2:
        m2 = _load(z2 + row * stride2 + start, lane, length, w2, WANTED & 4)
    if MODELS > 3:
        m3 = _load(z3 + row * stride3 + start, lane, length, w3, WANTED & 8)
    if HAS_BIAS:
        shift = tl.load(bias + row * bias_stride + start + lane, mask=inside, other=0.0)
    y = _weighted(m0, w0)
    if MODELS > 1:
        y += _weighted(m1, w1)
    if MODELS > 2:
        y += _weighted(m2, w2)
    if MODELS > 3:
        y += _weighted(m3, w3)
    if HAS_BIAS:
        y += shift
    return tl.where(inside, y, float("-inf")), m0, m1, m2, m3


@triton.jit
def load_tile(
    z0, z1, z2, z3, bias, w0, w1, w2, w3, stride0, stride1, stride2, stride3, bias_stride, vocabulary,
    row, start, MODELS: tl.constexpr, HAS_BIAS: tl.constexpr, WANTED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Load y (TILE,), -inf beyond the vocabulary, and the logits (TILE,) of the models that WANTED names."""
    return load_elements(
        z0, z1, z2, z3, bias, w0, w1, w2, w3, stride0, stride1, stride2, stride3, bias_stride, vocabulary,
        row, start, tl.arange(0, TILE), MODELS, HAS_BIAS, WANTED,
    )  # fmt: skip


@triton.jit
def temperature_of(settings, row, settings_stride):
    """Load the temperature, 1 for a greedy row; log2(e) / temperature; greedy."""
    temperature = tl.load(settings + row * settings_stride)
    greedy = temperature <= 0
    temperature = tl.where(greedy, 1.0, temperature)
    return temperature, tl.minimum(1.4426950408889634 / temperature, 3e38), greedy  # finite: infinity times 0 is NaN


@triton.jit
def exp_of(y, top, to_log2):
    """Return exp((y - top) / temperature). The difference first: it is exact under a large common offset."""
    return tl.exp2((y - top) * to_log2)


@triton.jit
def sum_of(e, TILE: tl.constexpr):
    """Return the float64 sum of e (TILE,)."""
    return tl.sum(tl.sum(tl.reshape(e, (TILE // _LANES, _LANES)), axis=1).to(tl.float64), axis=0)


@triton.jit
def _store_sum(x, to_log2, tops, sums, slot, TILE: tl.constexpr):
    top = tl.max(x, axis=0)
    e = exp_of(x, tl.where(top == float("-inf"), 0.0, top), to_log2)
    tl.store(tops + slot, top)
    tl.store(sums + slot, sum_of(e, TILE))


@triton.jit
def store_sums(
    y, m0, m1, m2, m3, to_log2, tops, sums, slot, tiles, WANTED: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Store the maximum and the sum of one tile, of y and of each wanted model."""
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
def combine_tiles(tile_tops, tile_sums, to_log2):
    """Return the row's maximum and the tiles' sums (TILES,), scaled to it.

    A row with +inf or NaN, or -inf everywhere, has sums of NaN.
    """
    top = tl.max(tile_tops, axis=0)
    return top, tile_sums * exp_of(tile_tops, top, to_log2).to(tl.float64)
