"""A test set that training has not seen: split by prompt, since pairs of one prompt tell about each other."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

from ..core.checks import check_integer, check_number
from .pairs import Comparison, Pair

T = TypeVar("T", Pair, Comparison, str)


def split_by_prompt(rows: Sequence[T], fraction: float = 0.1, seed: int = 0) -> tuple[list[T], list[T]]:
    """(train, test): `fraction` of the distinct prompts, at least one, make the test set; the rows keep their order.

    Which prompts depends on `seed` and the prompts alone, not on the order of the rows.
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
    drawn = set(sorted(prompts, key=lambda prompt: hashlib.sha256(f"{seed}:{prompt}".encode()).digest())[:count])
    return [row for row in rows if _prompt(row) not in drawn], [row for row in rows if _prompt(row) in drawn]


def _prompt(row: Pair | Comparison | str) -> str:
    return row if isinstance(row, str) else row.prompt
