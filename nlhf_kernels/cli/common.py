"""Helpers of the subcommands: help text filled to the terminal, devices and functions by name, next commands."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

from ..core.atomic import check_file
from ..core.stopping import Stopped
from ..core.terminal import new_console
from .errors import BadInput


def check_output(command: str, path: Path | None) -> None:
    """Raise where `path` cannot be written, before the work instead of after it."""
    if path is None:
        return
    try:
        check_file(path)
    except OSError as error:
        raise BadInput(f"{command}: --output: {error}") from error


Read = TypeVar("Read")


class Help(argparse.HelpFormatter):
    """Fill every paragraph of a description to the terminal's width; keep indented lines as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = []
        for paragraph in text.strip().split("\n\n"):
            head, *items = re.split(r"\n(?= )", paragraph)
            lines = [textwrap.fill(" ".join(head.split()), width)]
            lines += [textwrap.fill(item, width, subsequent_indent=" " * 6) for item in items]
            paragraphs.append("\n".join(lines))
        return "\n\n".join(paragraphs)


def find_device(command: str, name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, dtype=torch.uint8, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: CUDA on a CPU build of PyTorch
        raise BadInput(f"{command}: --device: expected a device PyTorch can use here; got {name!r}") from error


def read_data(place: str, load: Callable[..., Read], source: Any, *args: Any, **options: Any) -> Read:
    """Return `load(source, ...)`, a reader of `nlhf_kernels.data`; prefix its errors with `place`."""
    try:
        return load(source, *args, **options)
    except (TypeError, ValueError) as error:
        message = str(error).removeprefix("data: ")
        if message.startswith("split: "):  # --split beside --data, data.train_split beside data.train
            place = place.replace("--data", "--split") if "--" in place else f"{place}_split"
            message = message.removeprefix("split: ")
        raise BadInput(f"{place}: {message}") from error


def show_next(*commands: Sequence[str]) -> None:
    """Print the commands to run next on stderr, each complete, ready to be copied."""
    console = new_console(stderr=True)
    for number, words in enumerate(commands):
        line = " ".join(word if word in (">", "...") else shlex.quote(word) for word in words)
        console.print(f"{'     ' if number else 'Next:'} {line}", soft_wrap=True)


def is_function(name: str) -> bool:
    """Return whether `name` names a function rather than a model."""
    return ":" in name and not Path(name).exists()


def load_function(place: str, name: str) -> Any:
    """Return the function named by module:name or file.py:name; search modules in the working folder, too."""
    module, _, function = name.rpartition(":")
    if not module or not function:
        raise BadInput(f"{place}: expected module:name or file.py:name; got {name!r}")
    try:
        value = getattr(_file(Path(module)) if module.endswith(".py") else _module(module), function)
    except Stopped:
        raise
    except (Exception, SystemExit) as error:  # importing a module can raise anything
        raise BadInput(f"{place}: cannot load {name!r}: {type(error).__name__}: {error}") from error
    if not callable(value):
        raise BadInput(f"{place}: expected a function; got {type(value).__name__} as {name!r}")
    return value


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, "a .py file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _module(name: str) -> ModuleType:
    """Import a module, searching the working folder first, as `python -m` does and a script does not."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(Path.cwd()))
