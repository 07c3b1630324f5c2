"""decode_attention in plain PyTorch: the oracle. Equation numbers are those of README.md."""

from __future__ import annotations

import torch

from .op import DecodeAttentionInputs


def live_range(
    starts: torch.Tensor | None, ends: torch.Tensor, positions: int, window: int
) -> tuple[torch.Tensor, torch.Tensor]:  # (R,), (R,): the slots that a row reads, the last one excluded
    """Return the slots that a row reads, from its own positions: (2)."""
    end = ends.clamp(min=0)
    first = (end - window).clamp(min=0) if starts is None else torch.maximum(starts, end - window).clamp(min=0)
    rolled = (end - positions).clamp(min=0)
    return (first - rolled).clamp(min=0), end - rolled


def decode_attention(inputs: DecodeAttentionInputs) -> torch.Tensor:  # (R, Hq, Dv)
    query, keys, values, starts, ends, scale, window, softcap, sinks, _ = inputs
    rows, heads, dim = query.shape
    kv_heads, positions = keys.shape[1:3]
    real = torch.promote_types(query.dtype, torch.float32)
    first, last = live_range(starts, ends, positions, window)
    slot = torch.arange(positions, dtype=torch.int64, device=query.device)
    live = ((slot >= first[:, None]) & (slot < last[:, None]))[:, None, None, :]  # (R, 1, 1, L)
    grouped = query.to(real).view(rows, kv_heads, heads // kv_heads, dim)
    # Slots outside the range may hold NaN, and 0 * NaN is NaN: they are replaced, not weighted.
    k, v = (torch.where(live.mT, cache.to(real), 0) for cache in (keys, values))
    scores = grouped @ k.mT * scale  # (R, Hkv, G, L)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = torch.where(live, scores, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    sink = scores.new_full((heads,), -torch.inf) if sinks is None else sinks.to(real)
    sink = sink.view(kv_heads, -1, 1)  # (Hkv, G, 1)
    top = torch.maximum(top, sink)
    top = torch.where(top == -torch.inf, 0, top)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True) + torch.exp(sink - top)
    out = weights @ v / torch.where(total == 0, 1, total)  # (1); a row that reads nothing gives zeros
    return out.reshape(rows, heads, values.shape[3]).to(query.dtype)
