"""decode_attention in Triton: a program per row, key/value head and split of the row's range, then a merge of splits.

Equation numbers are those of README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...core import settings, tuning
from ...core.prepared import Result, Slot, Source, slots_of
from ...core.triton_launch import Launch, Scratch, TritonCall
from .op import DecodeAttentionInputs, attention_result

_TILE_BYTES = 8192  # of keys, and as many of values: small, so that a short range has several tiles in flight
#: Positions per split. Splitting costs a second launch and a pass over partial results, so a short cache has one split.
#: The number of splits depends on the cache's length alone: a row's result must not depend on the batch.
_SPLIT = 256
_MAX_SPLITS = 64
_HEADS = 16  # query heads per program: the rows of a tensor-core product, padded where there are fewer
_LOG2_E = tl.constexpr(1.4426950408889634)


class Plan(NamedTuple):
    tile: int  # positions read at a time, a power of two
    split: int  # positions per program
    warps: int
    stages: int


def _candidates(default: Plan) -> Iterator[Plan]:
    for tile in (16, 32, 64, 128):
        for split in (128, 256, 512):
            for warps in (2, 4, 8):
                yield Plan(tile, split, warps, default.stages)
    for stages in (2, 3, 4):
        yield default._replace(stages=stages)


_TUNABLE = tuning.Tunable("decode_attention", "triton", Plan, _candidates)


@triton.jit
def _exp(x):
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _finite(top):
    """Return the maximum to subtract: 0 in place of -inf, since -inf - -inf is NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _tanh(x):
    """Compute tanh: near 0 by a polynomial (Cephes), for a small relative error; it saturates at exactly +-1."""
    z = x * x
    p = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1
    near = (p * z - 3.33332819422e-1) * z * x + x
    far = 1.0 - 2.0 / (_exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def _live_range(starts, ends, row, positions, window, HAS_STARTS: tl.constexpr):
    """Return the slots [begin, end) that a row reads: (2)."""
    end = tl.maximum(tl.load(ends + row), 0)
    first = tl.maximum(end - window, 0)
    if HAS_STARTS:
        first = tl.maximum(first, tl.load(starts + row))
    rolled = tl.maximum(end - positions, 0)
    return tl.maximum(first - rolled, 0).to(tl.int32), (end - rolled).to(tl.int32)


@triton.jit
def _with_sink(top, total, acc, sinks, head, here):
    """Add the sink to the softmax: it has a weight and no value."""
    sink = tl.load(sinks + head, mask=here, other=0.0).to(tl.float32)
    base = _finite(tl.maximum(top, sink))
    factor = _exp(top - base)
    return total * factor + _exp(sink - base), acc * factor[:, None]


@triton.jit
def _dot(a, b, WIDE: tl.constexpr):
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b)


@triton.jit
def _scores(
    q, query, k, first_head, heads, dim, DIM: tl.constexpr, HEADS: tl.constexpr, DOT: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Return q k^T (HEADS, TILE) in float32."""
    if DOT:
        scores = _dot(q, tl.trans(k), WIDE)
    else:
        # Head by head: float32 products stay float32, and a single head does not fill a tensor core.
        scores = tl.zeros((HEADS, k.shape[0]), tl.float32)
        wide = k.to(tl.float32)
        for h in tl.static_range(HEADS):
            one = tl.load(query + h * DIM + dim, mask=(dim < DIM) & (first_head + h < heads), other=0.0)
            products = tl.sum(wide * one.to(tl.float32)[None, :], axis=1)
            scores = tl.where(tl.arange(0, HEADS)[:, None] == h, products[None, :], scores)
    return scores


@triton.jit
def _weighted(weights, v, HEADS: tl.constexpr, DOT: tl.constexpr, WIDE: tl.constexpr):
    """Return weights v (HEADS, VALUE_BLOCK) in float32."""
    if DOT:
        out = _dot(weights.to(v.dtype), v, WIDE)
    else:
        out = tl.zeros((HEADS, v.shape[1]), tl.float32)
        wide = v.to(tl.float32)
        for h in tl.static_range(HEADS):
            one = tl.sum(tl.where(tl.arange(0, HEADS)[:, None] == h, weights, 0.0), axis=0)
            total = tl.sum(wide * one[:, None], axis=0)
            out = tl.where(tl.arange(0, HEADS)[:, None] == h, total[None, :], out)
    return out


@triton.jit
def attend_kernel(
    query,  # (rows, kv_heads * GROUP, DIM)
    keys, values,  # (rows, kv_heads, positions, DIM or VALUE_DIM)
    starts, ends,  # (rows,)
    sinks,  # (kv_heads * GROUP,)
    out,  # (rows, kv_heads * GROUP, VALUE_DIM); with splits (.., SPLITS, VALUE_DIM) float32, before the division
    tops, sums,  # (rows, kv_heads * GROUP, SPLITS) float32; used with splits only
    key_row, key_head, key_slot, value_row, value_head, value_slot,  # strides
    kv_heads, positions, window, scale, softcap,
    GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr, HAS_STARTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, DOT: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    split = program % SPLITS
    parts: tl.constexpr = (GROUP + HEADS - 1) // HEADS  # programs per group of query heads
    first_head = program // SPLITS % parts * HEADS
    pair = program // (SPLITS * parts)
    row, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    head = first_head + tl.arange(0, HEADS)
    here = head < GROUP
    first = (row * kv_heads + kv_head) * GROUP + first_head  # the program's first head, among rows * heads
    lane = tl.arange(0, HEADS)
    dim, value_dim, slot = tl.arange(0, BLOCK), tl.arange(0, VALUE_BLOCK), tl.arange(0, TILE)
    query += first * DIM
    q = tl.load(query + lane[:, None] * DIM + dim[None, :], mask=here[:, None] & (dim < DIM)[None, :], other=0.0)

    begin, end = _live_range(starts, ends, row, positions, window, HAS_STARTS)
    length = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), SPLITS), TILE) * TILE
    begin += split * length
    end = tl.minimum(end, begin + length)
    key = keys + row * key_row + kv_head * key_head + begin.to(tl.int64) * key_slot
    value = values + row * value_row + kv_head * value_head + begin.to(tl.int64) * value_slot
    key += slot.to(tl.int64)[:, None] * key_slot + dim[None, :]
    value += slot.to(tl.int64)[:, None] * value_slot + value_dim[None, :]

    top = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, VALUE_BLOCK), tl.float32)
    for start in range(begin, end, TILE):
        inside = start + slot < end
        k = tl.load(key, mask=inside[:, None] & (dim < DIM)[None, :], other=0.0)
        v = tl.load(value, mask=inside[:, None] & (value_dim < VALUE_DIM)[None, :], other=0.0)
        scores = _scores(q, query, k, first_head, GROUP, dim, DIM, HEADS, DOT, WIDE) * scale
        if HAS_SOFTCAP:
            scores = softcap * _tanh(scores / softcap)
        scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        base = _finite(higher)
        factor = _exp(top - base)
        weights = _exp(scores - base[:, None])
        total = total * factor + tl.sum(weights, axis=1)
        acc = acc * factor[:, None] + _weighted(weights, v, HEADS, DOT, WIDE)
        top = higher
        key += TILE * tl.cast(key_slot, tl.int64)  # a stride of 1 is a constant, which has no `to`
        value += TILE * tl.cast(value_slot, tl.int64)

    inside = here[:, None] & (value_dim < VALUE_DIM)[None, :]
    if SPLITS == 1:
        if HAS_SINKS:
            total, acc = _with_sink(top, total, acc, sinks, kv_head * GROUP + head, here)
        acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    else:
        tl.store(tops + (first + lane) * SPLITS + split, top, mask=here)
        tl.store(sums + (first + lane) * SPLITS + split, total, mask=here)
        inside = inside & (total != 0)[:, None]  # the result of an empty split is neither written nor read
    target = ((first + lane) * SPLITS + split) * VALUE_DIM
    tl.store(out + target[:, None] + value_dim[None, :], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def merge_kernel(
    partial,  # (rows * heads, SPLITS, VALUE_DIM)
    tops, sums,  # (rows * heads, SPLITS)
    sinks,  # (heads,)
    out,  # (rows * heads, VALUE_DIM)
    heads,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one query head of one row: (3)."""
    program = tl.program_id(0).to(tl.int64)
    split, value_dim = tl.arange(0, BLOCK), tl.arange(0, VALUE_BLOCK)
    top = tl.load(tops + program * SPLITS + split, mask=split < SPLITS, other=float("-inf"))
    total = tl.load(sums + program * SPLITS + split, mask=split < SPLITS, other=0.0)
    highest = tl.max(top, axis=0)
    if HAS_SINKS:
        sink = tl.load(sinks + program % heads).to(tl.float32)
        highest = tl.maximum(highest, sink)
    base = _finite(highest)
    factor = _exp(top - base)
    inside = (total != 0)[:, None] & (value_dim < VALUE_DIM)[None, :]
    acc = tl.load(
        partial + (program * SPLITS + split)[:, None] * VALUE_DIM + value_dim[None, :], mask=inside, other=0.0
    )
    whole = tl.sum(total * factor, axis=0)
    if HAS_SINKS:
        whole += _exp(sink - base)
    result = tl.sum(acc * factor[:, None], axis=0) / tl.where(whole == 0, 1.0, whole)
    tl.store(out + program * VALUE_DIM + value_dim, result.to(out.dtype.element_ty), mask=value_dim < VALUE_DIM)


def decode_attention(inputs: DecodeAttentionInputs) -> torch.Tensor:
    result: torch.Tensor = prepare(inputs)(inputs)
    return result


def prepare(inputs: DecodeAttentionInputs) -> Callable[[DecodeAttentionInputs], Any]:
    """Return the function that attends with inputs of this signature: what depends on sizes is computed here, once."""
    query, keys, values, starts, _, scale, window, softcap, sinks, _ = inputs
    rows, heads, dim = query.shape
    _, kv_heads, positions, value_dim = values.shape
    group, result = heads // kv_heads, attention_result(inputs)
    if 0 in result.shape:
        return partial(_empty, result, query.device)
    dot = group > 1 and query.dtype != torch.float32
    at_once = _HEADS if dot else min(_HEADS, triton.next_power_of_2(group))
    block, value_block = (max(16, triton.next_power_of_2(size)) for size in (dim, value_dim))
    tile = max(16, min(128, _TILE_BYTES // (max(block, value_block) * query.element_size())))
    workload = tuning.make_workload(0, (heads, kv_heads, dim, value_dim), (query,))
    plan = _TUNABLE.plan(query.device, workload, Plan(tile, _SPLIT, 4, 4 if dot else 2))
    splits = max(1, min(_MAX_SPLITS, min(positions, window) // plan.split))

    slots, out = slots_of(inputs), Slot(Source.RESULT, 0)
    partial_results = [Result((rows, heads, splits, value_dim), torch.float32)]
    partial_results += [Result((rows, heads, splits), torch.float32)] * 2  # maxima and sums
    scratch = Scratch(*(partial_results if splits > 1 else ()))
    written = scratch.slots if splits > 1 else [out] * 3
    sinks_slot = slots.sinks or slots.query
    attend = Launch(
        attend_kernel, (rows * kv_heads * triton.cdiv(group, at_once) * splits,),
        (slots.query, slots.keys, slots.values, slots.starts or slots.ends, slots.ends, sinks_slot, *written),
        (*keys.stride()[:3], *values.stride()[:3], kv_heads, positions, window, scale, softcap),
        {
            "GROUP": group, "HEADS": at_once, "DIM": dim, "BLOCK": block, "VALUE_DIM": value_dim,
            "VALUE_BLOCK": value_block, "TILE": plan.tile, "SPLITS": splits, "HAS_STARTS": starts is not None,
            "HAS_SOFTCAP": softcap != 0, "HAS_SINKS": sinks is not None, "DOT": dot,
            "WIDE": settings.triton_interpret,  # the interpreter multiplies the bit patterns of bfloat16
            "num_warps": plan.warps, "num_stages": plan.stages,
        },
    )  # fmt: skip
    merge = Launch(
        merge_kernel, (rows * heads,), (*written, sinks_slot, out), (heads,),
        {
            "SPLITS": splits, "BLOCK": triton.next_power_of_2(splits), "VALUE_DIM": value_dim,
            "VALUE_BLOCK": value_block, "HAS_SINKS": sinks is not None, "num_warps": 4,
        },
    )  # fmt: skip
    return TritonCall(query.device, [result], scratch, [attend, merge] if splits > 1 else [attend])


def _empty(result: Result, device: torch.device, inputs: DecodeAttentionInputs) -> torch.Tensor:
    return torch.empty(result.shape, dtype=result.dtype, device=device)
