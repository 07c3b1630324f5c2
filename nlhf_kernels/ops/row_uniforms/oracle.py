"""row_uniforms in plain PyTorch: the oracle."""

from __future__ import annotations

import torch

from ...core import rng


def row_uniforms(seed: torch.Tensor, row_ids: torch.Tensor, step: torch.Tensor, stream: int) -> torch.Tensor:
    return rng.open_unit(rng.random_bits(seed, row_ids, step, stream))
