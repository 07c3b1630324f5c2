"""help() names every parameter: the Args block of a public function or class lists what its signature has."""

from __future__ import annotations

import enum
import importlib
import inspect
import re
from collections.abc import Iterator

import pytest

ROOMS = "data engine evaluation experiment integrations integrations.trl preference tabular train"
MODULES = ["nlhf_kernels", *(f"nlhf_kernels.{room}" for room in ROOMS.split())]
#: Configurations that inherit dozens of transformers' or TRL's fields: docs/configuration.md and migrating_from_trl.md
#: list theirs, and tests hold those pages to the fields.
CONFIGURATIONS = {"NashConfig", "NashMDConfig"}
ENTRY = re.compile(r"\s*([\w*, ]+?)(?: \(.*\))?:")


def parameters_of(thing: object) -> list[str]:
    names = inspect.signature(thing).parameters  # type: ignore[arg-type]
    return [name for name in names if name not in ("self", "cls") and not name.startswith("_")]


def documented_in(docstring: str) -> list[str]:
    """The names that the entries of the Args block begin with; an entry may name several."""
    names: list[str] = []
    lines = iter(docstring.splitlines())
    for line in lines:
        if line.strip() == "Args:":
            margin = indent_of(line)
            break
    entries = None
    for line in lines:
        if not line.strip():
            continue
        if indent_of(line) <= margin:
            break
        entries = indent_of(line) if entries is None else entries
        if indent_of(line) == entries and (match := ENTRY.match(line)):
            names += [name.strip(" *") for name in match[1].split(",")]
    return names


def indent_of(line: str) -> int:
    return len(line) - len(line.lstrip())


def public_callables() -> Iterator[tuple[str, object]]:
    for name in MODULES:
        module = importlib.import_module(name)
        for public in module.__all__:
            thing = getattr(module, public)
            if not (inspect.isroutine(thing) or inspect.isclass(thing)) or public in CONFIGURATIONS or is_unmade(thing):
                continue
            yield f"{name}.{public}", thing
            if inspect.isclass(thing):
                methods = ((each, value) for each, value in vars(thing).items() if inspect.isfunction(value))
                yield from ((f"{name}.{public}.{each}", value) for each, value in methods if not each.startswith("_"))


def is_unmade(thing: object) -> bool:
    """Whether users never make one: an enumeration, a protocol, an exception."""
    is_exception = inspect.isclass(thing) and issubclass(thing, BaseException)
    return is_exception or isinstance(thing, enum.EnumMeta) or getattr(thing, "_is_protocol", False)


CALLABLES = dict(public_callables())


@pytest.mark.parametrize("name", CALLABLES)
def test_every_parameter_is_documented(name) -> None:
    docstring = inspect.getdoc(CALLABLES[name]) or ""
    assert docstring.strip(), "a docstring says what it does"
    assert sorted(documented_in(docstring)) == sorted(parameters_of(CALLABLES[name]))


def test_the_reader_of_docstrings() -> None:
    text = "Do it.\n\n    Args:\n        a, b (int): numbers,\n            at least: 1.\n        *rest: others.\n"
    text += "\n    Returns c: it.\n"
    assert documented_in(text) == ["a", "b", "rest"]
    assert documented_in("Args are listed below.") == []
    assert len(CALLABLES) > 100
