"""What subcommands with models share: loading them, and one line for what the user got wrong.

`command` is the subcommand's name, which the line begins with.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..core.optional import need


class BadInput(Exception):
    """What the user gave cannot be used; the message is one line."""


def refuse(error: BaseException) -> int:
    """Says what is wrong in one line; the exit code of bad input."""
    print(f"nlhf-kernels: error: {first_line(error)}", file=sys.stderr)
    return 2


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def find_device(command: str, name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, dtype=torch.uint8, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: a CPU build of PyTorch that is asked for CUDA
        raise BadInput(f"{command}: --device: expected a device PyTorch can use here; got {name!r}") from error


def load_tokenizer(command: str, option: str, name: str, trust: bool) -> Any:
    """transformers makes an empty tokenizer for some folders that have none; so the files are looked for first."""
    transformers = need("transformers", command)
    folder = Path(name)
    if folder.is_dir() and not any(any(folder.glob(kind)) for kind in ("tokenizer*", "vocab*", "*.model")):
        raise BadInput(f"{command}: {option}: expected tokenizer files; got a folder without, {name!r}")
    load = transformers.AutoTokenizer.from_pretrained
    return load_model(command, option, name, lambda: load(name, trust_remote_code=trust), "tokenizer")


def load_model(command: str, option: str, name: str, load: Callable[[], Any], what: str = "model") -> Any:
    """`load()`; whatever it raises becomes one line about `option`."""
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise BadInput(
            f"{command}: {option}: expected a model's folder or its name on the hub; got {name!r}, no folder"
        )
    try:
        with quiet():
            return load()
    except Exception as error:  # many kinds, from many files; the first line of each says what is wrong
        raise BadInput(f"{command}: {option}: cannot load a {what} from {name!r}: {first_line(error)}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """No bars of transformers' own: ours are on stderr already, one at a time."""
    log = need("transformers", "nlhf-kernels").utils.logging
    bars = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            log.enable_progress_bar()
