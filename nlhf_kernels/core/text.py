"""Text from files, strict JSON, Markdown tables, and values and errors cut to what an error message has room for."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXCERPT = 80  # characters of a value in an error

_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxlist, _repr.maxtuple, _repr.maxdict, _repr.maxset = 3, 4, 4, 4, 4
_repr.maxstring = _repr.maxother = _repr.maxlong = 4 * EXCERPT


def excerpt(value: object, limit: int = EXCERPT) -> str:
    """Return repr(value), cut after `limit` characters; a large or recursive value is never formatted in full."""
    text = _repr.repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def first_line(error: BaseException) -> str:
    """Return an error's first line, and the second where the first only announces it."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(error).__name__


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, without the byte-order mark that spreadsheets write."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError("there is no such file") from None
    except OSError as error:
        raise ValueError(f"expected a text file; {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"expected a text file in UTF-8; got the byte 0x{byte:02x} at {error.start}") from error


def parse_json(text: str) -> Any:
    """Parse JSON; raise for a duplicate key, of which the json module would silently keep the last."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {excerpt(next(name for name in names if names.count(name) > 1))} is there twice")
    return content


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False) -> str:
    """Return a Markdown table; bars and line breaks inside cells are escaped.

    Args:
        head (sequence of str): the column titles.
        rows (sequence of sequences of str): as many cells each.
        numbers (bool): align all columns but the first on the right.
    """
    rule = ["---"] + ["---:" if numbers else "---"] * (len(head) - 1)
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in (head, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))
