"""What subcommands with models share: the device, models, tokenizers and functions by name.

`command` is the subcommand's name, which an error begins with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..core.optional import need
from ..core.places import locate
from .errors import BadInput, first_line


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

    def load(place: str) -> Any:
        folder = Path(place)
        if folder.is_dir() and not any(any(folder.glob(kind)) for kind in ("tokenizer*", "vocab*", "*.model")):
            raise BadInput(f"{command}: {option}: expected tokenizer files; got a folder without, {name!r}")
        return transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=trust)

    return load_model(command, option, name, load, "tokenizer")


def load_model(command: str, option: str, name: str, load: Callable[[str], Any], what: str = "model") -> Any:
    """`load(folder or hub name)`; whatever it raises becomes one line about `option`."""
    place = locate(f"{command}: {option}", name)
    try:
        with quiet():
            return load(place)
    except BadInput:
        raise
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
