"""decode_attention through the C++ module."""

from __future__ import annotations

import torch

from ...core import capabilities
from ...core.native import DTYPES


def decode_attention_cpu(
    query: torch.Tensor,  # (R, Hq, D), contiguous
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor | None,
    ends: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    rows, heads, dim = query.shape
    _, kv_heads, positions, value_dim = values.shape
    sinks = None if sinks is None else sinks.float()
    out = torch.empty((rows, heads, value_dim), dtype=torch.float32, device=query.device)
    capabilities.native("_cpu").decode_attention(
        DTYPES[query.dtype],
        (query.data_ptr(), keys.data_ptr(), values.data_ptr()),
        keys.stride()[:3],
        values.stride()[:3],
        starts.data_ptr() if starts is not None else 0,
        ends.data_ptr(),
        sinks.data_ptr() if sinks is not None else 0,
        (rows, heads, kv_heads, positions, dim, value_dim, window),
        scale,
        softcap,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out.to(query.dtype)
