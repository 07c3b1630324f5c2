"""Operations of a language model between matrix products, in Triton: one launch each instead of three to twelve.

Names, arguments and roundings are those of oracle.py. Inputs may be columns of a wider matrix: rows may have any
stride, the elements of a row must be contiguous. Outputs are contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...core.triton_launch import LaunchedFunction, Layout

_BLOCK = 1024  # elements of a gated activation per program


@triton.jit
def rms_norm_kernel(
    x,  # (outer, heads, D), strided
    weight,  # (D,)
    rest_weight,  # (D,), of all rows of `out` but the first
    out,  # (outer, heads, D)
    heads,
    outer_stride,
    head_stride,
    eps,
    D,
    first,
    TWO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    place = row // heads * outer_stride + row % heads * head_stride
    wide = tl.load(x + place + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / D + eps)
    normed = (wide * scale).to(out.dtype.element_ty).to(tl.float32)
    weight_at = weight + column
    if TWO:
        weight_at = tl.where(row < first, weight_at, rest_weight + column)
    weights = tl.load(weight_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * D + column, (weights * normed).to(out.dtype.element_ty), mask=inside)


def _rms_norm_layout(
    x: torch.Tensor, weight: torch.Tensor, eps: float, rest_weight: torch.Tensor, first: int, two: bool
) -> Layout:
    heads, width = x.shape[-2] if x.ndim > 2 else 1, x.shape[-1]
    rows = _as_rows(x) if x.ndim > 2 else x[:, None]  # (outer, heads, D)
    block = triton.next_power_of_2(width)
    count = rows.shape[0] * heads
    numbers = (heads, rows.stride(0), rows.stride(1), eps, width, first * (count // max(len(x), 1)))
    options = {"TWO": two, "BLOCK": block, "num_warps": min(max(block // 512, 1), 8)}
    return (rows, weight, rest_weight), ((x.shape, x.dtype),), rms_norm_kernel, (count,), numbers, options


_rms_norm = LaunchedFunction(_rms_norm_layout)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, rest_weight: torch.Tensor | None = None, first: int = 0
) -> torch.Tensor:
    two = rest_weight is not None
    return _rms_norm(x, weight, eps, rest_weight if two else weight, first, two)  # type: ignore[no-any-return]


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """Reshape (..., heads, D) to (outer, heads, D): a view where the outer dimensions can be merged."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.flatten(0, -3) if x.ndim > 3 else x


@triton.jit
def silu_product_kernel(gate, up, out, width, gate_stride, up_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    active = (x / (1.0 + tl.exp(-x))).to(out.dtype.element_ty).to(tl.float32)
    factor = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (active * factor).to(out.dtype.element_ty), mask=inside)


def _silu_product_layout(gate: torch.Tensor, up: torch.Tensor) -> Layout:
    shape, width = gate.shape, gate.shape[-1]
    gate, up = (x.flatten(0, -2) if x.stride(-1) == 1 else x.reshape(-1, width).contiguous() for x in (gate, up))
    numbers, grid = (width, gate.stride(0), up.stride(0)), (gate.shape[0], triton.cdiv(width, _BLOCK))
    return (gate, up), ((shape, gate.dtype),), silu_product_kernel, grid, numbers, {"BLOCK": _BLOCK}


_silu_product = LaunchedFunction(_silu_product_layout)


def silu_product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return _silu_product(gate, up)  # type: ignore[no-any-return]


@triton.jit
def rotate_kernel(
    query,  # (B, Hq, T, D), strided
    key,  # (B, Hkv, T, D), strided
    cos,  # (B, T, D), strided
    sin,
    query_out,  # (B, Hq, T, D)
    key_out,  # (B, Hkv, T, D)
    tokens,
    query_heads,
    key_heads,
    query_batch,
    query_head,
    query_token,
    key_batch,
    key_head,
    key_token,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rotate one head of one token per program: the query heads, then the key heads."""
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < HALF
    cos_place = cos + batch * cos_batch + token * cos_token + column
    sin_place = sin + batch * sin_batch + token * sin_token + column
    if head < query_heads:
        source = query + batch * query_batch + head * query_head + token * query_token
        target = query_out + ((batch * query_heads + head) * tokens + token) * 2 * HALF
    else:
        head -= query_heads
        source = key + batch * key_batch + head * key_head + token * key_token
        target = key_out + ((batch * key_heads + head) * tokens + token) * 2 * HALF
    first = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + column, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = query_out.dtype.element_ty
    for half in tl.static_range(2):
        straight, turned = (first, -second) if half == 0 else (second, first)
        cosine = tl.load(cos_place + half * HALF, mask=inside, other=0.0).to(tl.float32)
        sine = tl.load(sin_place + half * HALF, mask=inside, other=0.0).to(tl.float32)
        # Products are rounded before they are added, as separate operations round them.
        total = (straight * cosine).to(dtype).to(tl.float32) + (turned * sine).to(dtype).to(tl.float32)
        tl.store(target + half * HALF + column, total.to(dtype), mask=inside)


def _rotate_layout(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Layout:
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    (batch, query_heads, tokens, width), key_heads = query.shape, key.shape[1]
    cos, sin = ((x if x.stride(-1) == 1 else x.contiguous()).expand(batch, tokens, width) for x in (cos, sin))
    strides = (*query.stride()[:3], *key.stride()[:3], *cos.stride()[:2], *sin.stride()[:2])
    half = width // 2
    options = {"HALF": half, "BLOCK": triton.next_power_of_2(half), "num_warps": 1}
    results, grid = ((query.shape, query.dtype), (key.shape, key.dtype)), (batch * tokens, query_heads + key_heads)
    numbers = (tokens, query_heads, key_heads, *strides)
    return (query, key, cos, sin), results, rotate_kernel, grid, numbers, options


_rotate = LaunchedFunction(_rotate_layout)


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return _rotate(query, key, cos, sin)  # type: ignore[no-any-return]


@triton.jit
def store_slot_kernel(
    keys,  # (B, H, L, D), strided
    values,  # (B, H, L, Dv), strided
    key,  # (B, H, 1, D), strided
    value,  # (B, H, 1, Dv), strided
    cursor,  # (1,) int64
    length,
    keys_batch,
    keys_head,
    values_batch,
    values_head,
    key_batch,
    key_head,
    value_batch,
    value_head,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store one head of one row per program."""
    batch, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(cursor)
    column = tl.arange(0, BLOCK)
    exists = (slot >= 0) & (slot < length)
    inside = column < KEY_WIDTH
    new = tl.load(key + batch * key_batch + head * key_head + column, mask=inside)
    tl.store(keys + batch * keys_batch + head * keys_head + slot * KEY_WIDTH + column, new, mask=inside & exists)
    inside = column < VALUE_WIDTH
    new = tl.load(value + batch * value_batch + head * value_head + column, mask=inside)
    tl.store(
        values + batch * values_batch + head * values_head + slot * VALUE_WIDTH + column, new, mask=inside & exists
    )


def _store_slot_layout(
    keys: torch.Tensor, values: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cursor: torch.Tensor
) -> Layout:
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    rows, heads, length, width = keys.shape
    strides = (*keys.stride()[:2], *values.stride()[:2], *key.stride()[:2], *value.stride()[:2])
    options = {
        "KEY_WIDTH": width, "VALUE_WIDTH": values.shape[-1],
        "BLOCK": triton.next_power_of_2(max(width, values.shape[-1])), "num_warps": 1,
    }  # fmt: skip
    return (keys, values, key, value, cursor), (), store_slot_kernel, (rows, heads), (length, *strides), options


_store_slot = LaunchedFunction(_store_slot_layout)


def store_slot(
    keys: torch.Tensor, values: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cursor: torch.Tensor
) -> None:
    _store_slot(keys, values, key, value, cursor)
