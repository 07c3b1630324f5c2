"""decode_attention through the C++ module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...core import capabilities
from ...core.native import DTYPES
from ...core.prepared import PreparedCall, Slot, Source, slots_of
from .op import DecodeAttentionInputs, attention_result


def decode_attention_cpu(inputs: DecodeAttentionInputs) -> torch.Tensor:
    result: torch.Tensor = prepare(inputs)(inputs)
    return result


def prepare(inputs: DecodeAttentionInputs) -> Callable[[DecodeAttentionInputs], Any]:
    """Return how inputs of this signature are run: by the C++ function alone where all is float32 already."""
    sinks, dtype = inputs.sinks, inputs.query.dtype
    if dtype == torch.float32 and (sinks is None or sinks.dtype == torch.float32):
        return _prepared(inputs)
    in_float32 = _prepared(inputs._replace(sinks=None if sinks is None else sinks.float()))

    def run(inputs: DecodeAttentionInputs) -> torch.Tensor:
        sinks = inputs.sinks
        result: torch.Tensor = in_float32(inputs._replace(sinks=None if sinks is None else sinks.float()))
        return result.to(dtype)

    return run


def _prepared(inputs: DecodeAttentionInputs) -> PreparedCall:
    query, keys, values, _, _, scale, window, softcap, _, _ = inputs
    rows, heads, dim = query.shape
    _, kv_heads, positions, value_dim = values.shape
    slots = slots_of(inputs)
    arguments = (
        DTYPES[query.dtype],
        (slots.query, slots.keys, slots.values),
        keys.stride()[:3],
        values.stride()[:3],
        slots.starts or 0,
        slots.ends,
        slots.sinks or 0,
        (rows, heads, kv_heads, positions, dim, value_dim, window),
        scale,
        softcap,
        Slot(Source.RESULT, 0),
        Slot(Source.NOW, 0),
    )
    result = attention_result(inputs, torch.float32)
    step = capabilities.native("_cpu").decode_attention, arguments
    return PreparedCall(query.device, [result], [step], now=[torch.get_num_threads])
