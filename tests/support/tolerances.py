"""Tolerances against float64: a result's error may exceed PyTorch's at the same dtype by a small factor."""

from __future__ import annotations

import torch

FACTOR = 2.0

#: What rounding may add to the factor, relative to the size of the truth: a few units in the last place.
CONSTANT = {torch.float64: 1e-15, torch.float32: 5e-7, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def worst_error(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Return the largest |result - truth|; infinite if one is not finite and the other differs."""
    result, truth = result.detach().double().cpu(), truth.detach().double().cpu()
    assert result.shape == truth.shape, f"shape {tuple(result.shape)}, expected {tuple(truth.shape)}"
    same = (result == truth) | (result.isnan() & truth.isnan())
    error = torch.where(same, 0.0, (result - truth).abs())
    error = torch.where(error.isnan(), torch.inf, error)
    return float(error.max()) if error.numel() else 0.0


def assert_accurate(
    result: torch.Tensor, truth: torch.Tensor, pytorch: torch.Tensor, *, factor: float = FACTOR, constant: float = 1.0
) -> None:
    """Assert error(result) <= factor x error(pytorch) + constant, both against the float64 `truth`.

    pytorch   the same computation in PyTorch at the result's dtype
    constant  in multiples of this dtype's CONSTANT, scaled by the largest finite value of the truth
    """
    assert truth.dtype == torch.float64, "truth must be float64"
    assert result.dtype == pytorch.dtype, f"dtype {result.dtype}, PyTorch gives {pytorch.dtype}"
    finite = truth.detach().cpu()[truth.detach().cpu().isfinite()].abs()
    scale = max(1.0, float(finite.max())) if finite.numel() else 1.0
    allowed = factor * worst_error(pytorch, truth) + constant * CONSTANT[result.dtype] * scale
    error = worst_error(result, truth)
    assert error <= allowed, f"error {error:.3g} against float64, allowed {allowed:.3g}"
