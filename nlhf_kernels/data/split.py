"""A test set that shares no prompt with the training set, since pairs of one prompt are not independent."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

from ..core.checks import check_integer, check_number
from .pairs import Comparison, Pair

T = TypeVar("T", Pair, Comparison, str)


def split_by_prompt(rows: Sequence[T], fraction: float = 0.1, seed: int = 0) -> tuple[list[T], list[T]]:
    """Split rows into (train, test), each in the order of the rows.

    The choice depends on `seed` and the prompts alone, not on the order of the rows.

    Args:
        rows: pairs, comparisons or prompts.
        fraction: share of the distinct prompts, at least one, that makes the test set.
        seed: chooses the prompts.
    """
    check_number("split_by_prompt", "fraction", fraction, 0.0, 1.0, open_low=True)
    check_integer("split_by_prompt", "seed", seed, -(2**63), 2**63 - 1)
    prompts = {_prompt(row) for row in rows}
    count = max(1, round(fraction * len(prompts)))
    if count >= len(prompts):
        raise ValueError(
            f"split_by_prompt: rows: expected prompts for both sides; got {len(prompts)} distinct for a test fraction "
            f"of {fraction}"
        )
    test_prompts = set(sorted(prompts, key=lambda prompt: hashlib.sha256(f"{seed}:{prompt}".encode()).digest())[:count])
    train = [row for row in rows if _prompt(row) not in test_prompts]
    return train, [row for row in rows if _prompt(row) in test_prompts]


def _prompt(row: Pair | Comparison | str) -> str:
    return row if isinstance(row, str) else row.prompt
