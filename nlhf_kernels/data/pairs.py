"""Pairs and prompts as strings: columns checked row by row, conversations rendered by the tokenizer's chat template.

Standard rows hold strings; conversational rows hold lists of {"role", "content"} messages. A conversation becomes text
here, once: its prompt ends where the assistant is to speak, and a response is what the template adds for it, without
the special token that ends the turn: as a policy's responses are when they are decoded without special tokens. So a
model of preferences reads in its training what it will be asked about. Everything after this file works on strings.

Conversational pairs may come without a prompt: then it is the messages that both conversations begin with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .rows import Row, Source, read_rows

Messages = Sequence[dict[str, str]]


class Pair(NamedTuple):
    """A human preference: of two responses to `prompt`, `chosen` over `rejected`."""

    prompt: str
    chosen: str
    rejected: str


class Comparison(NamedTuple):
    """Two responses of which nobody has said yet which is better."""

    prompt: str
    first: str
    second: str


def load_pairs(source: Source, tokenizer: Any = None, *, split: str | None = None) -> list[Pair]:
    """Columns prompt, chosen, rejected; all rows are checked before any is returned."""
    return [Pair(*texts) for texts in _texts(source, Pair._fields, tokenizer, split)]


def load_comparisons(source: Source, tokenizer: Any = None, *, split: str | None = None) -> list[Comparison]:
    """Columns prompt, first, second."""
    return [Comparison(*texts) for texts in _texts(source, Comparison._fields, tokenizer, split)]


def load_prompts(source: Source, tokenizer: Any = None, *, split: str | None = None) -> list[str]:
    """Column prompt; others may be there."""
    return [text for (text,) in _texts(source, ("prompt",), tokenizer, split)]


def _texts(source: Source, columns: Sequence[str], tokenizer: Any, split: str | None) -> list[list[str]]:
    texts = [_read(place, row, columns, tokenizer) for place, row in read_rows(source, split=split)]
    if not texts:
        name = source if isinstance(source, str) else type(source).__name__
        raise ValueError(f"data: {name}: expected at least one row; got none")
    return texts


def _read(place: str, row: Row, columns: Sequence[str], tokenizer: Any) -> list[str]:
    row = _with_prompt(place, row, columns)
    if missing := [name for name in columns if name not in row]:
        raise ValueError(f"data: {place}: expected columns {', '.join(columns)}; {missing[0]} is not among {[*row]}")
    values = [row[name] for name in columns]
    kinds = {_kind(place, name, value) for name, value in zip(columns, values, strict=True)}
    if len(kinds) > 1:
        raise TypeError(f"data: {place}: expected all of {', '.join(columns)} as strings, or all as lists of messages")
    spoken = [values[0]] if kinds == {"text"} else [message["content"] for message in values[0]]
    if not any(text.strip() for text in spoken):
        raise ValueError(f"data: {place}: prompt: expected some text; got {values[0]!r}")
    if kinds == {"text"}:
        return values
    return _rendered(place, values[0], values[1:], tokenizer)


def _with_prompt(place: str, row: Row, columns: Sequence[str]) -> Row:
    """Two whole conversations instead of a prompt and two responses: split where they part."""
    both: list[Any] = [row.get(name) for name in columns[1:]]
    if "prompt" in row or not both or not all(isinstance(said, (list, tuple)) and said for said in both):
        return row
    for name, said in zip(columns[1:], both, strict=True):
        _kind(place, name, said)
    one, other = both
    shared = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    if not 0 < shared < min(len(one), len(other)):
        raise ValueError(
            f"data: {place}: expected a prompt, or conversations that begin alike and then differ; got {len(one)} and "
            f"{len(other)} messages of which the first {shared} are the same"
        )
    return {"prompt": one[:shared], columns[1]: one[shared:], columns[2]: other[shared:]}


def _kind(place: str, name: str, value: object) -> str:
    if isinstance(value, str):
        return "text"
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"data: {place}: {name}: expected a string or a list of messages; got {type(value).__name__}")
    if not value:
        raise ValueError(f"data: {place}: {name}: expected at least one message; got none")
    for message in value:
        whole = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not whole:
            raise TypeError(
                f"data: {place}: {name}: expected messages of the form {{'role': ..., 'content': ...}}, both strings; "
                f"got {str(message)[:80]}"
            )
    return "messages"


def _rendered(place: str, prompt: Messages, responses: Sequence[Messages], tokenizer: Any) -> list[str]:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"data: {place}: expected a tokenizer with a chat template to render messages; got none")
    if repeated := [said for said in responses if list(said[: len(prompt)]) == list(prompt)]:
        raise ValueError(
            f"data: {place}: expected responses apart from their prompt; got a conversation of {len(repeated[0])} "
            "messages that begins with the prompt's (leave the prompt's column out to have it split)"
        )
    try:
        beginning = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        wholes = [tokenizer.apply_chat_template([*prompt, *said], tokenize=False) for said in responses]
    except Exception as error:  # a template may raise whatever it wants
        raise ValueError(f"data: {place}: the chat template refuses the messages: {error}") from error
    for whole in wholes:
        if not whole.startswith(beginning):
            raise ValueError(
                f"data: {place}: expected a chat template that begins a conversation as it begins its prompt; "
                f"got {whole[: len(beginning)][-60:]!r} for {beginning[-60:]!r}"
            )
    return [beginning, *(_unmarked(whole.removeprefix(beginning), tokenizer) for whole in wholes)]


def _unmarked(response: str, tokenizer: Any) -> str:
    """Without the special token at its end, and the white space that a template may put after it."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    bare = response.rstrip()
    mark = max((token for token in special if bare.endswith(token)), key=len, default=None)
    return response if mark is None else bare.removesuffix(mark)
