"""Rows of data as TRL reads them: conversations rendered by its rules, and the way back from a text to its row.

Judges and rewards are asked about texts. A TRL reward function wants more: the row's own prompt, messages or text, and
the row's other columns. So the rows are kept by the text their prompt becomes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...data import read_rows

OP = "NashMDTrainer"
IMAGES = ("image", "images")


class Rows:
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.keep = False  # set by who will ask for rows
        self.asked: set[str] | None = set()  # columns that will be asked for; None: all
        self.by_text: dict[str, Mapping[str, Any]] = {}

    def will_ask(self, columns: Iterable[str] | None) -> None:
        self.keep = True
        self.asked = None if self.asked is None or columns is None else self.asked | set(columns)

    def read(self, name: str, source: Any) -> list[dict[str, str]]:
        """`source` with nothing but a text for a prompt in every row."""
        if not (hasattr(source, "__len__") or isinstance(source, str)):
            raise TypeError(f"{OP}: {name}: expected rows with a length; got {type(source).__name__}")
        rows = []
        try:
            for place, row in read_rows(source):
                text = self._text(place, row)
                if self.keep:
                    self._keep(place, text, row)
                rows.append({"prompt": text})
        except (TypeError, ValueError) as error:
            raise type(error)(f"{OP}: {name}: {error}") from error
        return rows

    def row(self, text: str) -> Mapping[str, Any]:
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

    def _keep(self, place: str, text: str, row: Mapping[str, Any]) -> None:
        known = self.by_text.setdefault(text, row)
        for column in {*known, *row} if self.asked is None else self.asked:
            if known is not row and repr(known.get(column)) != repr(row.get(column)):
                raise ValueError(
                    f"{place}: expected one {column!r} for one prompt, which reward functions find it by; got another "
                    f"row with the prompt {text[:60]!r} and a different one (remove the column, or the row)"
                )


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and "role" in message


def spoken(prompt: Any, answer: str) -> list[dict[str, Any]]:
    """The conversation with the answer in it, as one message with what the assistant had begun."""
    messages = list(prompt)
    if messages[-1]["role"] == "assistant":
        answer = messages.pop()["content"] + answer
    return [*messages, {"role": "assistant", "content": answer}]
