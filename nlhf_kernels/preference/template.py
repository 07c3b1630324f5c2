"""What a model reads of a pair: a template filled with token ids, cut to the model's room in a stated way.

The template's pieces and the texts put into them are tokenised apart and joined. So a cut never reaches into the
template, both orders of a pair hold the same tokens, and a text cannot melt into the words around it.
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
    """(words, the field that follows them or None), in the template's order; each field must stand in it once."""
    wanted = ", ".join(f"{{{field}}}" for field in fields)
    if not isinstance(template, str):
        raise TypeError(f"preference: template: expected a string with {wanted}; got {type(template).__name__}")
    try:
        pieces = [*string.Formatter().parse(template)]
    except ValueError as error:
        raise ValueError(f"preference: template: expected text with {wanted}; got {template!r}: {error}") from error
    found = [field for _, field, _, _ in pieces if field is not None]
    plain = not any(form or conversion for _, _, form, conversion in pieces)
    if sorted(found) != sorted(fields) or not plain:
        raise ValueError(f"preference: template: expected {wanted}, each once and no other; got {template!r}")
    return [(words, field) for words, field, _, _ in pieces]


@dataclass(frozen=True)
class InputFormat:
    """How a model reads: saved with it, since its answers mean nothing under another."""

    template: str
    max_length: int | None  # tokens of a whole row; None: no bound
    overlong: str = "error"  # or "truncate": the prompt loses its beginning; after it, the longer response its end

    def __post_init__(self) -> None:
        check_option("preference", "overlong", self.overlong, OVERLONG)
        if self.max_length is not None:
            check_integer("preference", "max_length", self.max_length, 1, 2**31)


class InputFormatter:
    """Fills a template. `rows` are lists of token ids, never padded."""

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
        """Token ids [example][field] that fit; `columns` holds the texts of each field, in the order of `fields`."""
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
            cut = f"{len(long)} of {len(examples)} texts cut to {self.input_format.max_length} tokens"
            warnings.warn(f"preference: {cut}", stacklevel=2)
        return [_cut(parts, room) if size > room else parts for parts, size in zip(examples, sizes, strict=True)]

    def fill(self, **parts: list[int]) -> list[int]:
        row = list(self._first)
        for words, field in self._pieces:
            row += words + (parts[field] if field else [])
        if not row:
            raise ValueError("preference: expected at least one token to read; got none in template and texts")
        return row


def _cut(parts: list[list[int]], room: int) -> list[list[int]]:
    """The prompt loses its beginning; with nothing left of it, the longer response its end, until they are equal."""
    prompt, *responses = parts
    spent = sum(map(len, responses))
    if spent <= room:
        return [prompt[len(prompt) - (room - spent) :], *responses]
    shortest = min(map(len, responses))
    limit = max(room - shortest, room // 2) if len(responses) == 2 else room
    return [[], *(response[:limit] for response in responses)]
