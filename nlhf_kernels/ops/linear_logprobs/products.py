"""The matrix products around a chunk of logits. They are PyTorch's: nothing beats cuBLAS and oneDNN at this size."""

from __future__ import annotations

from functools import cache

import torch

_BLOCK_BYTES = 64 << 20  # limit of a temporary in the weight's gradient
_CACHED_BYTES = 256 << 10  # stays in a core's cache between the write and the read


def logits_into(
    out: torch.Tensor,  # (C, V)
    hidden: torch.Tensor,  # (C, D)
    weight: torch.Tensor,  # (V, D)
    bias: torch.Tensor | None,  # (V,)
) -> torch.Tensor:
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)


def add_weight_gradient(
    total: torch.Tensor,  # (V, D) float32, or float64
    logits_gradient: torch.Tensor,  # (C, V)
    hidden: torch.Tensor,  # (C, D)
    first: bool,
) -> None:
    """total += logits_gradient^T hidden, accumulated in the precision of `total`; `first` overwrites it.

    Where PyTorch cannot multiply half precision into float32 the product of one chunk is rounded once, block by block
    of the vocabulary; the sum over chunks is still accumulated in float32. Float16 is multiplied as float32
    there: the sum of a frequent target can overflow float16.
    """
    keep = 0 if first else 1
    if logits_gradient.dtype == total.dtype:
        total.addmm_(logits_gradient.t(), hidden, beta=keep)
        return
    if _multiplies_into_float32(total.device, hidden.dtype):
        torch.addmm(total, logits_gradient.t(), hidden, beta=keep, out_dtype=torch.float32, out=total)
        return
    rows = max(1, _BLOCK_BYTES // (total.shape[1] * hidden.element_size()))
    if hidden.dtype == torch.float16:
        hidden = hidden.float()
    for start in range(0, total.shape[0], rows):
        product = logits_gradient[:, start : start + rows].to(hidden.dtype).t() @ hidden
        block = total[start : start + rows]
        block.copy_(product) if first else block.add_(product)


def scaled(part: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return part * scale, rounded to dtype in one pass: no scaled copy in float32 beside a large gradient."""
    out = torch.empty_like(part, dtype=dtype)
    if part.device.type != "cpu" or part.dtype == dtype or part.ndim < 2:
        return torch.mul(part, scale, out=out)
    rows = max(
        1, _CACHED_BYTES // (part.shape[1] * part.element_size())
    )  # on a CPU PyTorch makes that copy: keep it small
    for start in range(0, part.shape[0], rows):
        torch.mul(part[start : start + rows], scale, out=out[start : start + rows])
    return out


@cache
def _multiplies_into_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether PyTorch multiplies `dtype` into float32: not on a CPU; on CUDA in some versions. Tried once."""
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    total = torch.ones(16, 16, dtype=torch.float32, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return bool((total == 17).all())
