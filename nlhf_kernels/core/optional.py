"""Optional dependencies: imported where they are used; errors name the extra that installs them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

#: Package -> the extra of this library that installs it, and pip's name for it where that differs.
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
        if missing not in EXTRAS:  # installed, but broken: installing it again does not help
            raise ImportError(f"{who} needs {package}, which cannot be imported: {error}") from error
        raise ImportError(_missing(who, [missing], EXTRAS[missing])) from error


def require(who: str, packages: Sequence[str], extra: str) -> None:
    """Raise one ImportError for all of `packages` that are not installed; `extra` installs all of them."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(_missing(who, missing, extra))


def _missing(who: str, packages: Sequence[str], extra: str) -> str:
    names = ", ".join(DISTRIBUTIONS.get(name, name) for name in packages)
    return f'{who} needs {names}: pip install "nlhf-kernels[{extra}]"'
