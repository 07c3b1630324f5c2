"""Rows of data as TRL reads them: conversations rendered by its rules, and a look-up of rows by their prompt's text.

Judges and rewards are called with texts. A TRL reward function also takes the row's own prompt, messages or text, and
the row's other columns, so rows are stored by the text that their prompt is rendered to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...data import read_rows

OP = "NashMDTrainer"
IMAGES = ("image", "images")


class Rows:
    """Read rows with TRL's rules for conversations, and store those that reward functions will look up.

    Args:
        tokenizer: its chat template renders conversations.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.stores_rows = False
        self.columns: set[str] | None = set()  # that reward functions take; None: all
        self.by_text: dict[str, Mapping[str, Any]] = {}

    def register(self, columns: Iterable[str] | None) -> None:
        """Store the rows that are read from now on, for a reward function that takes `columns`; None: all."""
        self.stores_rows = True
        self.columns = None if self.columns is None or columns is None else self.columns | set(columns)

    def read(self, name: str, source: Any) -> list[dict[str, str]]:
        """Return rows with the text of each prompt alone."""
        if not (hasattr(source, "__len__") or isinstance(source, str)):
            raise TypeError(f"{OP}: {name}: expected rows with a length; got {type(source).__name__}")
        rows = []
        try:
            for place, row in read_rows(source):
                text = self._text(place, row)
                if self.stores_rows:
                    self._store(place, text, row)
                rows.append({"prompt": text})
        except (TypeError, ValueError) as error:
            raise type(error)(f"{OP}: {name}: {error}") from error
        return rows

    def row(self, text: str) -> Mapping[str, Any]:
        """Return the row whose prompt is rendered to `text`."""
        return self.by_text[text]

    def _text(self, place: str, row: Mapping[str, Any]) -> str:
        for column in IMAGES:
            if column in row:
                raise ValueError(f"{place}: expected prompts of text alone; got a column {column!r}")
        prompt = row.get("prompt")
        if isinstance(prompt, str):
            if row.get("chat_template_kwargs"):
                raise ValueError(f"{place}: chat_template_kwargs: expected with a prompt of messages; got a text")
            return prompt
        if not isinstance(prompt, (list, tuple)) or not prompt or not all(map(_is_message, prompt)):
            raise ValueError(f"{place}: expected a column 'prompt', a text or a list of messages; got {prompt!r}")
        role = prompt[-1]["role"]
        if role not in ("user", "tool", "assistant"):
            raise ValueError(f"{place}: prompt: expected the last message from user, tool or assistant; got {role!r}")
        text = self.tokenizer.apply_chat_template(
            list(prompt),
            tokenize=False,
            add_generation_prompt=role != "assistant",
            continue_final_message=role == "assistant",
            **(row.get("chat_template_kwargs") or {}),
        )
        return str(text)

    def _store(self, place: str, text: str, row: Mapping[str, Any]) -> None:
        first = self.by_text.setdefault(text, row)
        for column in {*first, *row} if self.columns is None else self.columns:
            if first is not row and repr(first.get(column)) != repr(row.get(column)):
                raise ValueError(
                    f"{place}: expected one {column!r} for one prompt, which reward functions find it by; got another "
                    f"row with the prompt {text[:60]!r} and a different one (remove the column, or the row)"
                )


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and "role" in message


def with_answer(prompt: Any, answer: str) -> list[dict[str, Any]]:
    """Return the conversation with the answer, joined to a message that the assistant had begun."""
    messages = list(prompt)
    if messages[-1]["role"] == "assistant":
        answer = messages.pop()["content"] + answer
    return [*messages, {"role": "assistant", "content": answer}]
