"""decode_attention through the C++ module."""

from __future__ import annotations

import torch

from ...core import capabilities
from ...core.native import DTYPES
from .op import DecodeAttentionInputs, empty_result


def decode_attention_cpu(inputs: DecodeAttentionInputs) -> torch.Tensor:
    query, keys, values, starts, ends, scale, window, softcap, sinks, _ = inputs
    rows, heads, dim = query.shape
    _, kv_heads, positions, value_dim = values.shape
    sinks = None if sinks is None else sinks.float()
    out = empty_result(inputs, torch.float32)
    capabilities.native("_cpu").decode_attention(
        DTYPES[query.dtype],
        (query.data_ptr(), keys.data_ptr(), values.data_ptr()),
        keys.stride()[:3],
        values.stride()[:3],
        0 if starts is None else starts.data_ptr(),
        ends.data_ptr(),
        0 if sinks is None else sinks.data_ptr(),
        (rows, heads, kv_heads, positions, dim, value_dim, window),
        scale,
        softcap,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out.to(query.dtype)
