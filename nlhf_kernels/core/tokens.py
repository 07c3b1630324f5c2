"""Token ids and positions: which ids end a text, and which position each token of a padded batch has."""

from __future__ import annotations

from typing import Any

import torch


def count_positions(mask: torch.Tensor) -> torch.Tensor:
    """Count positions over each row's own tokens, so that padding on the left moves nothing.

    Args:
        mask ((..., S) integers or bool): 0 at padding. The position of padding is 0: it is masked anyway.
    """
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def flatten_ids(ids: Any) -> tuple[int, ...]:
    """Return token ids as a tuple, from the forms that transformers and callers use.

    Args:
        ids: None (no id), a number, a sequence of numbers or a tensor.
    """
    if ids is None:
        return ()
    return tuple(torch.as_tensor(ids, dtype=torch.int64, device="cpu").flatten().tolist())


def end_token_ids(model: Any, tokenizer: Any = None) -> tuple[int, ...]:
    """Return the ids that end a text: those of the model's generation config, then the tokenizer's, each once.

    Args:
        model: a causal language model of transformers.
        tokenizer: a tokenizer of transformers; None: the model's ids alone.
    """
    of_model = flatten_ids(getattr(getattr(model, "generation_config", None), "eos_token_id", None))
    of_tokenizer = flatten_ids(getattr(tokenizer, "eos_token_id", None))
    return tuple(dict.fromkeys([*of_model, *of_tokenizer]))
