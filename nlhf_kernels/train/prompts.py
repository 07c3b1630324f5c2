"""Prompts: read, checked and tokenised before training starts, and padded on the left in batches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..core.identity import digest
from ..core.tokens import end_token_ids
from ..data import encode_prompts, load_prompts, pad_left

_log = logging.getLogger(__name__)


class Prompt(NamedTuple):
    number: int  # in the data set; the noise of its answers depends on it, not on the batch
    text: str  # for the judge
    ids: list[int]


class PromptDataset(torch.utils.data.Dataset[Prompt]):
    """The prompts of rows, tokenised.

    Args:
        name: of the argument that errors name.
        rows: rows with a column `prompt`: texts, or lists of chat messages for the tokenizer's chat template.
        tokenizer: tokenises the texts.
        max_length: tokens; of longer prompts the last ones are kept.
        first: number of rows to read, from the first; None: all.
    """

    def __init__(self, name: str, rows: Any, tokenizer: Any, max_length: int, first: int | None = None) -> None:
        if isinstance(rows, torch.utils.data.IterableDataset) or not (
            hasattr(rows, "__len__") or isinstance(rows, str)
        ):
            raise TypeError(
                f"NashTrainer: {name}: expected rows with a length, so that a run can be resumed where it was; "
                f"got {type(rows).__name__}"
            )
        try:
            texts = load_prompts(rows, tokenizer)[:first]
            ids = encode_prompts(tokenizer, texts, max_length)
        except (TypeError, ValueError) as error:
            raise type(error)(f"NashTrainer: {name}: {error}") from error
        self.prompts = [Prompt(*prompt) for prompt in zip(range(len(texts)), texts, ids, strict=True)]
        full = sum(len(row) == max_length for row in ids)
        if full:
            _log.warning("%s: %d of %d prompts fill max_prompt_length and may have been cut", name, full, len(ids))

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]

    def digest(self) -> str:
        """Return a digest of all texts and tokens in order, by which a resumed run recognises its prompts."""
        return digest(repr([(prompt.text, prompt.ids) for prompt in self.prompts]))


class PromptCollator:
    """Pad prompts to a batch for the engine. A class, so that worker processes can pickle it."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        return {
            **pad_left([prompt.ids for prompt in prompts], self.pad_id, "cpu"),
            "index": torch.tensor([prompt.number for prompt in prompts], dtype=torch.int64, device="cpu"),
            "texts": [prompt.text for prompt in prompts],
        }


def special_tokens(tokenizer: Any, model: Any) -> tuple[tuple[int, ...], int]:
    """Return the end tokens, the model's and the tokenizer's, and the padding token; raise where there is none."""
    if not callable(tokenizer) or not hasattr(tokenizer, "eos_token_id"):
        raise TypeError(f"NashTrainer: processing_class: expected a tokenizer; got {type(tokenizer).__name__}")
    end_ids = end_token_ids(model, tokenizer)
    if not end_ids:
        raise ValueError("NashTrainer: processing_class: expected a tokenizer with an end token; got one without")
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "NashTrainer: processing_class: expected a tokenizer with a padding token; got one without "
            "(tokenizer.pad_token = tokenizer.eos_token will do: padding is masked)"
        )
    return end_ids, int(tokenizer.pad_token_id)


def check_vocabulary(tokenizer: Any, width: int) -> None:
    if len(tokenizer) > width:
        raise ValueError(
            f"NashTrainer: processing_class: expected at most the model's {width} tokens; got {len(tokenizer)}"
        )
