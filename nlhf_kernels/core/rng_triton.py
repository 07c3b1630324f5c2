"""The randomness contract of core/rng.py as Triton device functions."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox_4x32(c0, c1, c2, c3, k0, k1):  # uint64 values that hold 32-bit words
    for _ in tl.static_range(10):
        product0 = c0 * 0xD2511F53
        product1 = c2 * 0xCD9E8D57
        c0 = (product1 >> 32) ^ c1 ^ k0
        c2 = (product0 >> 32) ^ c3 ^ k1
        c1 = product1 & 0xFFFFFFFF
        c3 = product0 & 0xFFFFFFFF
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


@triton.jit
def random_block(seed, row_id, step, stream, block):
    seed = seed.to(tl.uint64, bitcast=True)
    row = row_id.to(tl.uint64, bitcast=True)
    last = (stream << 24) | block
    return philox_4x32(
        row & 0xFFFFFFFF,
        row >> 32,
        step.to(tl.uint64, bitcast=True) & 0xFFFFFFFF,
        last.to(tl.uint64),
        seed & 0xFFFFFFFF,
        seed >> 32,
    )


@triton.jit
def random_bits(seed, row_id, step, stream):
    """Return 64 random bits as uint64."""
    low, high, _, _ = random_block(seed, row_id, step, stream, tl.zeros_like(row_id))
    return (high << 32) | low


@triton.jit
def open_unit(bits):
    return ((bits >> 12).to(tl.int64).to(tl.float64) + 0.5) * 2.220446049250313e-16  # 2^-52, exactly
