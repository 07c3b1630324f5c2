"""row_uniforms in Triton: one program per block of rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...core.native import on_device
from ...core.rng_triton import open_unit, random_bits
from .op import RowUniformsInputs

_BLOCK = 256  # rows a program


@triton.jit
def row_uniforms_kernel(
    seed,  # () or (rows,) int64
    row_ids,  # (rows,) int64
    step,  # () or (rows,) int64
    out,  # (rows,) float64
    rows,
    seed_stride,
    step_stride,
    STREAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    bits = random_bits(
        tl.load(seed + row * seed_stride, mask=inside, other=0),
        tl.load(row_ids + row, mask=inside, other=0),
        tl.load(step + row * step_stride, mask=inside, other=0),
        STREAM,
    )
    tl.store(out + row, open_unit(bits), mask=inside)


def row_uniforms(inputs: RowUniformsInputs) -> torch.Tensor:
    seed, row_ids, step, stream, _ = inputs
    rows, out = row_ids.numel(), torch.empty_like(row_ids, dtype=torch.float64)
    if rows:
        with on_device(out.device):
            row_uniforms_kernel[(triton.cdiv(rows, _BLOCK),)](
                seed, row_ids, step, out, rows, seed.ndim, step.ndim, STREAM=stream, BLOCK=_BLOCK
            )
    return out
