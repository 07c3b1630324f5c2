"""Pairs and prompts as strings: columns checked row by row, conversations rendered by the tokenizer's chat template.

Standard rows hold strings; conversational rows hold lists of {"role", "content"} messages. A conversation becomes text
here, once: its prompt ends where the assistant's turn begins, and a response is the text that the template adds for
it, without the special token that ends the turn. A policy's responses, decoded without special tokens, have the same
form, so a preference model is trained on texts like those that it will compare. All other packages work on strings.

The prompt of a conversational row is found in one of three layouts:

    prompt is messages                      the responses are what follows them, or repeat them first
    prompt is a string                      the user's message of that content, which the responses may repeat first
    no prompt                               the messages that both conversations begin with

`load_prompts` reads the same prompts from such rows as `load_pairs` does, so one file serves judge and policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..core.text import excerpt
from .rows import Row, Source, read_rows

Messages = Sequence[dict[str, str]]


class Pair(NamedTuple):
    """A human preference: `chosen` over `rejected`.

    Args:
        prompt: the text that both responses answer.
        chosen: the preferred response.
        rejected: the other one.
    """

    prompt: str
    chosen: str
    rejected: str


class Comparison(NamedTuple):
    """Two responses to compare.

    Args:
        prompt: the text that both responses answer.
        first, second: the responses.
    """

    prompt: str
    first: str
    second: str


#: Columns beside `prompt` that show whether a row is a conversation, where the prompt alone is read.
_BESIDE = (Pair._fields[1:], Comparison._fields[1:])


def load_pairs(source: Source, tokenizer: Any = None, *, split: str | None = None) -> list[Pair]:
    """Read columns prompt, chosen and rejected; all rows are checked before any is returned.

    Args:
        source: a file (.jsonl, .json, .csv; with `datasets` .parquet), a folder of `save_to_disk`, a name on the hub, a
            `datasets.Dataset`, or dicts.
        tokenizer: its chat template renders conversations; not needed where all rows are strings.
        split: part of a hub data set (None: train) or of a saved `DatasetDict`.
    """
    return [Pair(*texts) for texts in _texts(source, Pair._fields, tokenizer, split)]


def load_comparisons(source: Source, tokenizer: Any = None, *, split: str | None = None) -> list[Comparison]:
    """Read columns prompt, first and second.

    Args:
        source: a file (.jsonl, .json, .csv; with `datasets` .parquet), a folder of `save_to_disk`, a name on the hub, a
            `datasets.Dataset`, or dicts.
        tokenizer: its chat template renders conversations; not needed where all rows are strings.
        split: part of a hub data set (None: train) or of a saved `DatasetDict`.
    """
    return [Comparison(*texts) for texts in _texts(source, Comparison._fields, tokenizer, split)]


def load_prompts(source: Source, tokenizer: Any = None, *, split: str | None = None, chat: bool = False) -> list[str]:
    """Read a column prompt, or the prompts of pairs; other columns are ignored.

    Args:
        source: a file (.jsonl, .json, .csv; with `datasets` .parquet), a folder of `save_to_disk`, a name on the hub, a
            `datasets.Dataset`, or dicts.
        tokenizer: its chat template renders conversations; not needed where all rows are strings.
        split: part of a hub data set (None: train) or of a saved `DatasetDict`.
        chat: render a prompt that is a string as a user's message.
    """
    return [text for (text,) in _texts(source, ("prompt",), tokenizer, split, chat)]


def check_pairs(op: str, pairs: Sequence[Pair], name: str = "pairs") -> None:
    """Raise where `pairs` holds something else; a dict of three columns would be read as its keys.

    Args:
        op: the function that errors name.
        pairs: of `load_pairs`.
        name: the argument that errors name.
    """
    for index, pair in enumerate(pairs):
        if not isinstance(pair, tuple) or len(pair) != 3:
            raise TypeError(
                f"{op}: {name}[{index}]: expected a Pair (load_pairs makes them of rows); got {type(pair).__name__}"
            )


def _texts(
    source: Source, columns: Sequence[str], tokenizer: Any, split: str | None, chat: bool = False
) -> list[list[str]]:
    texts = [_read(place, row, columns, tokenizer, chat) for place, row in read_rows(source, split=split)]
    if not texts:
        name = source if isinstance(source, str | Path) else type(source).__name__
        raise ValueError(f"data: {name}: expected at least one row; got none")
    return texts


def _read(place: str, row: Row, columns: Sequence[str], tokenizer: Any, chat: bool) -> list[str]:
    row = _with_prompt(place, row, columns[1:])
    if missing := [name for name in columns if name not in row]:
        raise ValueError(f"data: {place}: expected columns {', '.join(columns)}; {missing[0]} is not among {[*row]}")
    values = [row[name] for name in columns]
    kinds = {_kind(place, name, value) for name, value in zip(columns, values, strict=True)}
    if len(kinds) > 1:
        raise TypeError(f"data: {place}: expected all of {', '.join(columns)} as strings, or all as lists of messages")
    prompt_texts = [values[0]] if kinds == {"text"} else [message["content"] for message in values[0]]
    if not any(text.strip() for text in prompt_texts):
        raise ValueError(f"data: {place}: prompt: expected some text; got {excerpt(values[0])}")
    if kinds == {"text"} and not chat:
        return values
    if kinds == {"text"}:
        values[0] = [{"role": "user", "content": values[0]}]
    return _render(place, values[0], values[1:], tokenizer)


def _with_prompt(place: str, row: Row, responses: Sequence[str]) -> Row:
    """Return the row; of a conversation, the prompt as messages and each response as the messages that follow."""
    prompt = row.get("prompt")
    for names in [responses] if responses else _BESIDE:
        conversations: list[Any] = [row.get(name) for name in names]
        if not all(isinstance(messages, (list, tuple)) and messages for messages in conversations):
            continue
        for name, messages in zip(names, conversations, strict=True):
            _kind(place, name, messages)
        if prompt is None:
            count, messages = _shared_beginning(place, conversations)
        elif isinstance(prompt, str):
            count, messages = _string_prompt(place, prompt, names, conversations)
        else:
            count, messages = _message_prompt(place, prompt, names, conversations)
        return {**row, "prompt": messages, **{name: row[name][count:] for name in names}}
    if not responses and isinstance(prompt, str) and isinstance(messages := row.get("messages"), (list, tuple)):
        _kind(place, "messages", messages)
        if (index := _find_user(prompt, messages)) is not None:
            return {**row, "prompt": messages[: index + 1]}
    return row


def _shared_beginning(place: str, conversations: Sequence[Messages]) -> tuple[int, Messages]:
    """Return how many messages two whole conversations have in common at their beginning, and them: the prompt."""
    one, other = conversations
    shared = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    if not 0 < shared < min(len(one), len(other)):
        raise ValueError(
            f"data: {place}: expected a prompt, or conversations that begin alike and then differ; got {len(one)} and "
            f"{len(other)} messages of which the first {shared} are the same"
        )
    return shared, one[:shared]


def _string_prompt(
    place: str, prompt: str, names: Sequence[str], conversations: Sequence[Messages]
) -> tuple[int, Messages]:
    """Return how many messages of the conversations belong to a prompt that is a string, and it as messages."""
    if not any(message["role"] == "user" for messages in conversations for message in messages):
        return 0, [{"role": "user", "content": prompt}]
    indices = [_find_user(prompt, messages) for messages in conversations]
    for name, messages, index in zip(names, conversations, indices, strict=True):
        if index is None:
            raise ValueError(
                f"data: {place}: {name}: expected a user's message that is the prompt, {excerpt(prompt)}; "
                f"got {excerpt(list(messages))}"
            )
    count = (indices[0] or 0) + 1
    prompt_messages = conversations[0][:count]
    if any(list(messages[:count]) != list(prompt_messages) for messages in conversations):
        raise ValueError(f"data: {place}: expected the same messages up to the prompt in {' and '.join(names)}")
    return count, prompt_messages


def _message_prompt(
    place: str, prompt: Any, names: Sequence[str], conversations: Sequence[Messages]
) -> tuple[int, Messages]:
    """Return how many messages of the conversations repeat a prompt of messages (all of them or none), and it."""
    _kind(place, "prompt", prompt)
    repeats = [list(messages[: len(prompt)]) == list(prompt) for messages in conversations]
    if any(repeats) and not all(repeats):
        name, other = (names[repeats.index(value)] for value in (True, False))
        raise ValueError(
            f"data: {place}: expected both responses to begin with the prompt's messages, or none of them; got {name} "
            f"that does and {other} that does not"
        )
    return len(prompt) if all(repeats) else 0, prompt


def _find_user(prompt: str, messages: Messages) -> int | None:
    """Return the index of the first user's message whose content is the prompt."""
    text = prompt.strip()
    return next((n for n, m in enumerate(messages) if m["role"] == "user" and m["content"].strip() == text), None)


def _kind(place: str, name: str, value: object) -> str:
    if isinstance(value, str):
        return "text"
    if not isinstance(value, (list, tuple)):
        got = "nothing (null)" if value is None else type(value).__name__
        raise TypeError(f"data: {place}: {name}: expected a string or a list of messages; got {got}")
    if not value:
        raise ValueError(f"data: {place}: {name}: expected at least one message; got none")
    for message in value:
        whole = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not whole:
            raise TypeError(
                f"data: {place}: {name}: expected messages of the form {{'role': ..., 'content': ...}}, both strings; "
                f"got {excerpt(message)}"
            )
    return "messages"


def _render(place: str, prompt: Messages, responses: Sequence[Messages], tokenizer: Any) -> list[str]:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"data: {place}: expected a tokenizer with a chat template to render messages; got none")
    try:
        beginning = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        wholes = [tokenizer.apply_chat_template([*prompt, *response], tokenize=False) for response in responses]
    except Exception as error:  # a template may raise any exception
        raise ValueError(f"data: {place}: the chat template refuses the messages: {error}") from error
    for whole in wholes:
        if not whole.startswith(beginning):
            raise ValueError(
                f"data: {place}: expected a chat template that begins a conversation as it begins its prompt; "
                f"got {whole[: len(beginning)][-60:]!r} for {beginning[-60:]!r}"
            )
    return [beginning, *(_without_end_mark(whole.removeprefix(beginning), tokenizer) for whole in wholes)]


def _without_end_mark(response: str, tokenizer: Any) -> str:
    """Remove the special token at the end, and white space that a template puts after it."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    bare = response.rstrip()
    mark = max((token for token in special if bare.endswith(token)), key=len, default=None)
    return response if mark is None else bare.removesuffix(mark)
