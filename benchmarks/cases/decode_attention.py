"""decode_attention: one new token per row over a key/value cache, against transformers' attention implementations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..harness.case import Baseline, Case, Inputs, Shape


def _starts(rows: int, positions: int) -> list[int]:
    """Return the left padding of each row, up to a fifth of the cache."""
    return [row % 4 * positions // 16 for row in range(rows)]


def make(shape: Shape, device: torch.device, generator: torch.Generator) -> Inputs:
    rows, heads, kv_heads, positions, dim = (
        int(shape.sizes[name]) for name in ("rows", "heads", "kv_heads", "positions", "dim")
    )

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device=device, generator=generator).to(shape.torch_dtype)

    cache = (rows, kv_heads, positions, dim)
    return Inputs(
        args=(normal(rows, heads, dim), normal(*cache), normal(*cache)),
        kwargs={
            "starts": torch.tensor(_starts(rows, positions)).to(device),
            "ends": torch.full((rows,), positions, device=device),
        },
    )


def truth(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **ranges: torch.Tensor) -> torch.Tensor:
    """Run the library's oracle in float64; its own tests compare it with PyTorch's attention."""
    from nlhf_kernels.ops.decode_attention import oracle
    from nlhf_kernels.ops.decode_attention.op import DecodeAttentionInputs

    starts, ends = ranges["starts"], ranges["ends"]
    scale = query.shape[-1] ** -0.5
    return oracle.decode_attention(
        DecodeAttentionInputs(
            query, keys, values, starts, ends, scale, window=2**62, softcap=0.0, sinks=None, backend="torch"
        )
    )


@functools.lru_cache(maxsize=8)
def _mask(starts: torch.Tensor, ends: torch.Tensor, positions: int) -> torch.Tensor:  # (R, 1, 1, L) bool
    """Make the mask once and keep it, as a model does for all its layers: its cost is not measured."""
    slot = torch.arange(positions, device=ends.device)
    return ((slot >= starts[:, None]) & (slot < ends[:, None]))[:, None, None]


@functools.lru_cache(maxsize=8)
def _additive(starts: torch.Tensor, ends: torch.Tensor, positions: int, dtype: torch.dtype) -> torch.Tensor:
    mask = _mask(starts, ends, positions)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _repeated(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Run transformers' eager attention: repeat_kv, scores, mask, softmax in float32."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (cache.repeat_interleave(group, 1) for cache in (keys, values))
    scores = torch.matmul(query.unsqueeze(2), keys.transpose(2, 3)) * query.shape[-1] ** -0.5 + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, values).squeeze(2)


def eager(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **ranges: torch.Tensor) -> torch.Tensor:
    return _repeated(query, keys, values, _additive(ranges["starts"], ranges["ends"], keys.shape[2], query.dtype))


def compiled() -> Callable[..., Any]:
    function = torch.compile(_repeated)

    def call(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **ranges: torch.Tensor) -> torch.Tensor:
        mask = _additive(ranges["starts"], ranges["ends"], keys.shape[2], query.dtype)
        result: torch.Tensor = function(query, keys, values, mask)
        return result

    return call


def sdpa(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **ranges: torch.Tensor) -> torch.Tensor:
    """Run PyTorch's own grouped-query attention."""
    mask = _mask(ranges["starts"], ranges["ends"], keys.shape[2])
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(query.unsqueeze(2), keys, values, attn_mask=mask, enable_gqa=True).squeeze(2)


def sdpa_packed(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **ranges: torch.Tensor) -> torch.Tensor:
    """Do as transformers 5.23 in eager mode: pass the heads of a group as query positions of one head."""
    mask = _mask(ranges["starts"], ranges["ends"], keys.shape[2])
    rows, heads, dim = query.shape
    packed = query.reshape(rows, keys.shape[1], heads // keys.shape[1], dim)
    out = torch.nn.functional.scaled_dot_product_attention(packed, keys, values, attn_mask=mask)
    return out.reshape(rows, heads, dim)


def bytes_moved(shape: Shape, mode: str) -> float:
    """Count one read of the live part of both caches, the query, and the output."""
    rows, heads, kv_heads, positions, dim = (
        int(shape.sizes[name]) for name in ("rows", "heads", "kv_heads", "positions", "dim")
    )
    live = sum(positions - start for start in _starts(rows, positions))
    return 2.0 * shape.torch_dtype.itemsize * dim * (live * kv_heads + rows * heads)


def flops(shape: Shape, mode: str) -> float:
    return 0.0  # two FLOPs per head and element read: bandwidth is the bound


def _shape(rows: int, heads: int, kv_heads: int, positions: int, dim: int, dtype: str, device: str) -> Shape:
    sizes = {"rows": rows, "heads": heads, "kv_heads": kv_heads, "positions": positions, "dim": dim}
    return Shape(sizes, dtype, devices=(device,))


CASE = Case(
    name="decode_attention",
    op="decode_attention",
    shapes={
        "tiny": [
            Shape({"rows": 3, "heads": 4, "kv_heads": 2, "positions": 40, "dim": 32}),
            Shape({"rows": 2, "heads": 4, "kv_heads": 1, "positions": 520, "dim": 64}, "bfloat16"),
        ],
        "standard": [
            _shape(8, 8, 2, 256, 64, "float32", "cpu"),
            _shape(8, 8, 2, 256, 64, "bfloat16", "cpu"),
            _shape(32, 14, 2, 192, 64, "float32", "cpu"),
            _shape(8, 32, 8, 2048, 128, "float32", "cpu"),
            _shape(8, 32, 8, 2048, 128, "bfloat16", "cpu"),
            _shape(32, 14, 2, 192, 64, "bfloat16", "cuda"),  # the rollouts of a 0.5B and of a 7B model
            _shape(32, 28, 4, 192, 128, "bfloat16", "cuda"),
            _shape(32, 32, 8, 4096, 128, "bfloat16", "cuda"),
            _shape(1, 32, 8, 16_384, 128, "bfloat16", "cuda"),
            _shape(256, 32, 8, 1024, 128, "bfloat16", "cuda"),
            _shape(32, 32, 8, 4096, 128, "float32", "cuda"),
        ],
    },
    make=make,
    truth=truth,
    baselines={"eager": Baseline(eager), "sdpa, grouped": Baseline(sdpa), "sdpa, packed": Baseline(sdpa_packed)},
    compiled=compiled,
    bytes_moved=bytes_moved,
    flops=flops,
)
