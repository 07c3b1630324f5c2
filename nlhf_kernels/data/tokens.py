"""Token ids of texts: prompts are truncated on the left to a maximal length, and padded on the left for decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..core.checks import check_integer
from ..core.text import excerpt


def leading_ids(tokenizer: Any) -> list[int]:
    """Return the beginning-of-sequence token, in a list, if the tokenizer puts one before texts by itself; else [].

    Args:
        tokenizer: a transformers tokenizer.
    """
    return [id for id in tokenizer("")["input_ids"][:1] if id == tokenizer.bos_token_id]


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of the texts alone: no special token is added, those written in a text keep their meaning.

    Args:
        tokenizer: a transformers tokenizer.
        texts: the texts.
    """
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    return ids


def encode_prompts(tokenizer: Any, prompts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
    """Return the token ids of prompts, each behind the tokenizer's beginning-of-sequence token.

    A text that begins with that token gets no second one.

    Args:
        tokenizer: a transformers tokenizer.
        prompts: the texts.
        max_length: of a longer prompt the last tokens are kept, and the beginning-of-sequence token; None: no limit.
    """
    if max_length is not None:
        check_integer("encode_prompts", "max_length", max_length, 2, 2**31)
    first = leading_ids(tokenizer)
    rows = []
    for index, ids in enumerate(encode(tokenizer, prompts)):
        bare = ids[len(first) :] if first and ids[: len(first)] == first else ids
        if not first and not bare:
            raise ValueError(
                f"encode_prompts: prompts[{index}]: expected at least one token; got none in {excerpt(prompts[index])}"
            )
        room = len(bare) if max_length is None else max_length - len(first)
        rows.append(first + bare[max(0, len(bare) - room) :])
    return rows


def pad_left(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str | None = None
) -> dict[str, torch.Tensor]:
    """Return rows of token ids as `input_ids` and `attention_mask`, (B, S) int64 each.

    Args:
        rows: B rows of token ids.
        pad_id: token before shorter rows; it is masked.
        device: of the tensors.
    """
    longest = max(map(len, rows))
    ids = [[pad_id] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {
        "input_ids": torch.tensor(ids, dtype=torch.int64, device=device),
        "attention_mask": torch.tensor(mask, dtype=torch.int64, device=device),
    }


def prompt_batch(
    tokenizer: Any,
    prompts: Sequence[str],
    max_length: int | None = None,
    device: torch.device | str | None = None,
) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask`, (B, S) int64, padded on the left: the inputs of `generate()`.

    Args:
        tokenizer: a transformers tokenizer.
        prompts: B texts, at least one.
        max_length: as for `encode_prompts`.
        device: of the tensors.
    """
    if not prompts:
        raise ValueError("prompt_batch: prompts: expected at least one; got none")
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)  # padding is masked, so any token serves
    pad_id = next(id for id in ids if id is not None)
    return pad_left(encode_prompts(tokenizer, prompts, max_length), pad_id, device)
