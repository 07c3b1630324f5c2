"""From text to token ids: prompts cut from the left where they are too long, and padded on the left for decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..core.checks import check_integer


def leading_ids(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token, where this tokenizer puts one before a text of its own accord."""
    return [id for id in tokenizer("")["input_ids"][:1] if id == tokenizer.bos_token_id]


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of the texts alone: nothing is put before or after them, marks inside them keep their meaning."""
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    return ids


def encode_prompts(tokenizer: Any, prompts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
    """Each prompt behind the tokenizer's beginning-of-sequence token, unless its text begins with it already.

    Of a prompt longer than `max_length` the last tokens stay, and that first one.
    """
    if max_length is not None:
        check_integer("encode_prompts", "max_length", max_length, 2, 2**31)
    first = leading_ids(tokenizer)
    rows = []
    for index, ids in enumerate(encode(tokenizer, prompts)):
        bare = ids[len(first) :] if first and ids[: len(first)] == first else ids
        if not first and not bare:
            raise ValueError(f"encode_prompts: prompts[{index}]: expected at least one token; got none")
        room = len(bare) if max_length is None else max_length - len(first)
        rows.append(first + bare[max(0, len(bare) - room) :])
    return rows


def prompt_batch(
    tokenizer: Any,
    prompts: Sequence[str],
    max_length: int | None = None,
    device: torch.device | str | None = None,
) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` (B, S), int64, padded on the left: what `generate()` wants."""
    if not prompts:
        raise ValueError("prompt_batch: prompts: expected at least one; got none")
    rows = encode_prompts(tokenizer, prompts, max_length)
    longest = max(map(len, rows))
    pad = next(
        (id for id in (tokenizer.pad_token_id, tokenizer.eos_token_id) if id is not None), 0
    )  # masked: any will do
    ids = [[pad] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {
        "input_ids": torch.tensor(ids, dtype=torch.int64, device=device),
        "attention_mask": torch.tensor(mask, dtype=torch.int64, device=device),
    }
