"""A summarisation task that needs no download: the docstrings of the packages installed on this machine.

The text is a docstring's body, the summary its first line. Sources are parsed, never imported. Modules come in the
order of their names' hashes, so that a sample taken from the front holds something of every package, and a module's
hash alone says whether it is for training or for testing.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..core.checks import check_integer, check_number

WORD = re.compile(r"[A-Za-z]+")
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "node_modules"}
_HAS_DOCSTRING = re.compile(rb'"""|\'\'\'')
_BLOCKS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Docstring(NamedTuple):
    module: str
    text: str
    summary: str


@dataclass(frozen=True)
class Collection:
    """Which docstrings are collected. The lengths keep the task within reach of a small model.

    Args:
        count (int): docstrings; the search ends there.
        test_fraction (float): of the modules.
        text_characters (int): of a body, cut between words; bodies shorter than a quarter of it are left out.
        summary_characters (int): of a first line, at most.
    """

    count: int
    test_fraction: float = 0.1
    text_characters: int = 240
    summary_characters: int = 80

    def __post_init__(self) -> None:
        check_integer("docstrings", "count", self.count, 2, 10**7)
        check_number("docstrings", "test_fraction", self.test_fraction, 0.0, 1.0, open_low=True)
        check_integer("docstrings", "text_characters", self.text_characters, 40, 10**5)
        check_integer("docstrings", "summary_characters", self.summary_characters, 10, 10**4)


def collect(
    settings: Collection,
    folders: Sequence[Path] | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[list[Docstring], list[Docstring]]:
    """Return (train, test) docstrings with distinct texts and summaries; raise if there are too few.

    Args:
        settings (Collection): how many, and which.
        folders (sequence of Path or None): of Python sources; None: the standard library and all installed packages.
        advance (callable): called with the number of docstrings so far.
    """
    modules = _modules(installed_folders() if folders is None else folders)
    known_keys: set[str] = set()
    docstrings: list[Docstring] = []
    for name, path in modules:
        for text, summary in _pairs(path, settings):
            keys = {"text " + _key(text), "summary " + _key(summary)}
            if not keys & known_keys:
                known_keys |= keys
                docstrings.append(Docstring(name, text, summary))
        advance(min(len(docstrings), settings.count))
        if len(docstrings) >= settings.count:
            break
    docstrings = docstrings[: settings.count]
    test = [item for item in docstrings if share(f"test {item.module}") < settings.test_fraction]
    train = [item for item in docstrings if share(f"test {item.module}") >= settings.test_fraction]
    if len(docstrings) < settings.count or len(test) < 2 or not train:
        raise ValueError(
            f"docstrings: expected {settings.count} with a first line and a body in the Python packages installed "
            f"here, 2 of them to test on; got {len(docstrings)} from {len(modules)} modules ({len(test)} to test on): "
            "install packages with documented sources (pip install transformers scipy scikit-learn), ask for fewer "
            "(--set examples=...), or give pairs of your own (--data)"
        )
    return train, test


def share(name: str) -> float:
    """Return a number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big") / 2**56


def installed_folders() -> list[Path]:
    paths = sysconfig.get_paths()
    return [Path(folder) for folder in dict.fromkeys((paths["stdlib"], paths["purelib"], paths["platlib"]))]


def _modules(folders: Iterable[Path]) -> list[tuple[str, Path]]:
    """Return (dotted name, file), each once, in the order of the names' hashes."""
    modules: dict[str, Path] = {}
    for folder in folders:
        for path in _python_files(folder):
            name = ".".join(path.relative_to(folder).with_suffix("").parts)
            modules.setdefault(name, path)
    return sorted(modules.items(), key=lambda item: (share(item[0]), item[0]))


def _python_files(folder: Path) -> Iterator[Path]:
    """Yield the folder's Python files, sorted, so that of two modules of one name the same one is taken everywhere."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:  # a folder without permission to read it
        return
    for path in entries:
        if path.suffix == ".py":
            yield path
        elif path.name not in _SKIPPED and "." not in path.name and path.is_dir():
            yield from _python_files(path)


def _pairs(path: Path, settings: Collection) -> Iterator[tuple[str, str]]:
    try:
        source = path.read_bytes()
        if not _HAS_DOCSTRING.search(source):
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other people's escape sequences
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):  # unreadable, or for another Python
        return
    for node in _documented(tree):
        docstring = ast.get_docstring(node)
        pair = split_docstring(docstring, settings) if docstring else None
        if pair is not None:
            yield pair


def _documented(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield modules, classes, functions and methods; definitions inside functions are left out."""
    yield node
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, _BLOCKS):
                yield from _documented(child)


def split_docstring(docstring: str, settings: Collection) -> tuple[str, str] | None:
    """Split into (text, summary); None if the first line is no summary or the body is too short."""
    first, _, rest = docstring.strip().partition("\n")
    second, _, body = rest.partition("\n")
    summary = " ".join(first.split())
    plain = summary.isascii() and summary[:1].isalpha() and not summary.endswith((":", ",", "("))
    if second.strip() or not plain or len(summary) > settings.summary_characters or len(WORD.findall(summary)) < 3:
        return None
    lines = (line.strip() for line in body.splitlines())
    prose = (line for line in lines if WORD.search(line) and not line.startswith((">>>", "...", ".. ", "```")))
    text = " ".join(" ".join(prose).split())
    if len(text) < settings.text_characters // 4 or not text.isascii() or len(WORD.findall(text)) < 5:
        return None
    return cut(text, settings.text_characters), summary


def cut(text: str, characters: int) -> str:
    """Truncate the text to at most so many characters, between words."""
    if len(text) <= characters:
        return text
    whole = text[: characters + 1].rpartition(" ")[0]
    return whole or text[:characters]


def _key(text: str) -> str:
    return " ".join(WORD.findall(text.lower()))
