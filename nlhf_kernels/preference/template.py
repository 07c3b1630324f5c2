"""The input of a comparison model: a template filled with token ids, truncated to the model's length.

The template's pieces and the texts between them are tokenised separately and joined. Truncation therefore never affects
the template, both orders of a pair contain the same tokens, and no token spans a text and the template around it.
"""

from __future__ import annotations

import string
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..core.checks import check_integer, check_option
from ..data import encode, leading_ids

OVERLONG = ("error", "truncate")


def parse_template(template: str, fields: Sequence[str]) -> list[tuple[str, str | None]]:
    """Return (words, the field that follows them or None) in the template's order; each field must occur once."""
    expected = ", ".join(f"{{{field}}}" for field in fields)
    if not isinstance(template, str):
        raise TypeError(f"preference: template: expected a string with {expected}; got {type(template).__name__}")
    try:
        pieces = [*string.Formatter().parse(template)]
    except ValueError as error:
        raise ValueError(f"preference: template: expected text with {expected}; got {template!r}: {error}") from error
    names = [field for _, field, _, _ in pieces if field is not None]
    plain = not any(form or conversion for _, _, form, conversion in pieces)
    if sorted(names) != sorted(fields) or not plain:
        raise ValueError(f"preference: template: expected {expected}, each once and no other; got {template!r}")
    return [(words, field) for words, field, _, _ in pieces]


@dataclass(frozen=True)
class InputFormat:
    """The conversion of a pair to rows of tokens, saved with the model, which is valid for this format only.

    Args:
        template: text around the fields, each `{field}` once.
        max_length: tokens of a whole row; None: no limit.
        overlong: "error" refuses longer rows; "truncate" removes the prompt's beginning, then, with nothing left of the
            prompt, the end of the longer response.
    """

    template: str
    max_length: int | None
    overlong: str = "error"

    def __post_init__(self) -> None:
        check_option("preference", "overlong", self.overlong, OVERLONG)
        if self.max_length is not None:
            check_integer("preference", "max_length", self.max_length, 1, 2**31)


class InputFormatter:
    """Fill a template with tokenised texts; rows are lists of token ids, not padded.

    Args:
        tokenizer: of the model.
        input_format: template and length.
        fields: the template's fields.
    """

    def __init__(self, tokenizer: Any, input_format: InputFormat, fields: Sequence[str]) -> None:
        self.tokenizer, self.input_format, self.fields = tokenizer, input_format, tuple(fields)
        pieces = parse_template(input_format.template, fields)
        words = encode(tokenizer, [words for words, _ in pieces])
        self._first = leading_ids(tokenizer)
        self._pieces = [(ids, field) for ids, (_, field) in zip(words, pieces, strict=True)]
        own = len(self._first) + sum(map(len, words))
        self.room = None if input_format.max_length is None else input_format.max_length - own
        if self.room is not None and self.room < 1:
            raise ValueError(
                f"preference: max_length: expected more than the template's own {own} tokens; got "
                f"{input_format.max_length}"
            )

    def tokenize(self, columns: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """Return token ids [example][field], truncated where that is allowed.

        Args:
            columns: the texts of each field, in the order of `fields`.
        """
        if len({len(texts) for texts in columns}) > 1:
            counts = ", ".join(f"{len(texts)} of {field}" for field, texts in zip(self.fields, columns, strict=True))
            raise ValueError(f"preference: expected as many texts of each; got {counts}")
        for field, texts in zip(self.fields, columns, strict=True):
            if isinstance(texts, str):
                raise TypeError(f"preference: {field}: expected a list of texts; got one string, {texts[:40]!r}")
        encoded = [encode(self.tokenizer, texts) for texts in columns]
        examples = [list(parts) for parts in zip(*encoded, strict=True)]
        sizes = [sum(map(len, parts)) for parts in examples]
        room = max(sizes, default=0) if self.room is None else self.room
        long = [index for index, size in enumerate(sizes) if size > room]
        if long and self.input_format.overlong == "error":
            worst = max(long, key=lambda index: sizes[index])
            raise ValueError(
                f"preference: {len(long)} of {len(examples)} texts are too long: expected at most {room} tokens beside "
                f"the template's (max_length={self.input_format.max_length}); got {sizes[worst]} in number {worst}, "
                f"{self.fields[0]} {columns[0][worst][:40]!r} (overlong='truncate' cuts them)"
            )
        if long:
            what = f"{len(long)} of {len(examples)} texts cut to {self.input_format.max_length} tokens"
            warnings.warn(f"preference: {what}", stacklevel=2)
        return [_truncate(parts, room) if size > room else parts for parts, size in zip(examples, sizes, strict=True)]

    def fill(self, **parts: list[int]) -> list[int]:
        """Return a row: the template around the token ids of each field.

        Args:
            parts: field -> its token ids.
        """
        row = list(self._first)
        for words, field in self._pieces:
            row += words + (parts[field] if field else [])
        if not row:
            raise ValueError("preference: expected at least one token to read; got none in template and texts")
        return row


def _truncate(parts: list[list[int]], room: int) -> list[list[int]]:
    """Truncate the prompt on the left; once it is empty, truncate the longer response on the right, then both."""
    prompt, *responses = parts
    length = sum(map(len, responses))
    if length <= room:
        return [prompt[len(prompt) - (room - length) :], *responses]
    shortest = min(map(len, responses))
    limit = max(room - shortest, room // 2) if len(responses) == 2 else room
    return [[], *(response[:limit] for response in responses)]
