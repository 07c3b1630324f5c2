"""The randomness contract: Philox4x32-10 and its counter's layout. This is the oracle of every other copy.

    key      seed                                      64 bits
    counter  row id                                    64 bits
             step                                      32 bits (the low ones)
             stream << 24 | block                       8 + 24 bits

A random word depends on these five numbers only: never on a program id, a tile, a position in the batch or a device.
`seed`, `row_ids` and `step` live in int64 tensors on the device, so that a captured graph advances when they change.
A block is four 32-bit words. A row's one uniform is 64 bits: words 0 and 1 of block 0. Noise per vocabulary index v,
where a kernel needs it, takes words 2 (v % 2) and 2 (v % 2) + 1 of block 1 + v // 2.

The same functions: csrc/common/philox.h (C++ and CUDA), core/rng_triton.py (Triton).
"""

from __future__ import annotations

from enum import IntEnum

import torch

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


class Stream(IntEnum):
    """What is sampled. Two streams of one (seed, row, step) are independent."""

    POLICY = 0  # y ~ pi
    OPPONENT = 1  # y' ~ pi^beta
    USER = 128  # from here to 255: free for users


def philox_4x32(counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Return four words from a counter of four and a key of two, all int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # An int64 product wraps modulo 2^64: its bits are those of the unsigned product.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & WORD) ^ c1 ^ k0,
            product1 & WORD,
            ((product0 >> 32) & WORD) ^ c3 ^ k1,
            product0 & WORD,
        )
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def random_block(
    seed: torch.Tensor, row_ids: torch.Tensor, step: torch.Tensor, stream: int, block: torch.Tensor | int = 0
) -> tuple[torch.Tensor, ...]:
    """Return the block of words of every row; the arguments broadcast."""
    last = torch.full_like(step, stream << 24) | block  # filled: a captured graph permits no copy from the host
    counter = (row_ids & WORD, (row_ids >> 32) & WORD, step & WORD, last)
    return philox_4x32(counter, (seed & WORD, (seed >> 32) & WORD))


def random_bits(seed: torch.Tensor, row_ids: torch.Tensor, step: torch.Tensor, stream: int) -> torch.Tensor:
    """Return 64 random bits a row, as int64."""
    low, high, _, _ = random_block(seed, row_ids, step, stream)
    return (high << 32) | low


def open_unit(bits: torch.Tensor) -> torch.Tensor:
    """Return (k + 1/2) / 2^52 for the upper 52 bits k: exact in float64, never 0, never 1."""
    return (((bits >> 12) & ((1 << 52) - 1)).to(torch.float64) + 0.5) * 2.0**-52
