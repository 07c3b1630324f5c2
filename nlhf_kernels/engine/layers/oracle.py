"""Operations of a language model between matrix products, in plain PyTorch: the oracle of triton_kernels.py.

Every function rounds where transformers' code does, so a kernel that equals it reproduces the model's own numbers.
"""

from __future__ import annotations

import torch


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, rest_weight: torch.Tensor | None = None, first: int = 0
) -> torch.Tensor:  # (..., D), (D,) -> (..., D)
    """weight x / sqrt(mean(x^2) + eps), computed in float32 and rounded before the product with the weight.

    With `rest_weight` the `first` entries of x take `weight`, and the rest that.
    """
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    if rest_weight is None:
        return weight * normed
    normed[:first] *= weight
    normed[first:] *= rest_weight
    return normed


def silu_product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:  # (..., I) each -> (..., I)
    """silu(gate) up."""
    return torch.nn.functional.silu(gate) * up


def rotate(
    query: torch.Tensor,  # (B, Hq, T, D)
    key: torch.Tensor,  # (B, Hkv, T, D)
    cos: torch.Tensor,  # (B or 1, T, D)
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary positions: x cos + (-second half of x, first half of x) sin."""
    return tuple(x * cos.unsqueeze(1) + _rotate_half(x) * sin.unsqueeze(1) for x in (query, key))  # type: ignore[return-value]


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def store_slot(
    keys: torch.Tensor,  # (B, H, L, D), written
    values: torch.Tensor,  # (B, H, L, Dv), written
    key: torch.Tensor,  # (B, H, 1, D)
    value: torch.Tensor,  # (B, H, 1, Dv)
    cursor: torch.Tensor,  # (1,) int64: the slot
) -> None:
    """Write one slot of a key/value cache."""
    keys.index_copy_(2, cursor, key)
    values.index_copy_(2, cursor, value)
