"""Packages that not everybody has installed: imported where they are used, and named with what brings them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

#: Package -> the extra of this library that brings it, and pip's name for it where that is another one.
EXTRAS = {
    "transformers": "transformers",
    "tokenizers": "transformers",
    "safetensors": "transformers",
    "huggingface_hub": "transformers",
    "accelerate": "train",
    "datasets": "train",
    "peft": "train",
    "yaml": "train",
    "matplotlib": "plots",
}
DISTRIBUTIONS = {"yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}


def need(package: str, who: str) -> Any:
    """Import `package`; an error begins with `who` and names the package that is missing and how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if missing not in EXTRAS:  # there, but broken: installing it again is not what helps
            raise ImportError(f"{who} needs {package}, which cannot be imported: {error}") from error
        raise ImportError(_missing(who, [missing], EXTRAS[missing])) from error


def require(who: str, packages: Sequence[str], extra: str) -> None:
    """Raise one ImportError for all of `packages` that are not installed; `extra` is what brings all of them."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(_missing(who, missing, extra))


def _missing(who: str, packages: Sequence[str], extra: str) -> str:
    names = ", ".join(DISTRIBUTIONS.get(name, name) for name in packages)
    return f'{who} needs {names}: pip install "nlhf-kernels[{extra}]"'
