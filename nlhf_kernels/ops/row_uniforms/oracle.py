"""row_uniforms in plain PyTorch: the oracle."""

from __future__ import annotations

import torch

from ...core import rng
from .op import RowUniformsInputs


def row_uniforms(inputs: RowUniformsInputs) -> torch.Tensor:
    return rng.open_unit(rng.random_bits(inputs.seed, inputs.row_ids, inputs.step, inputs.stream))
