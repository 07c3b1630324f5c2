"""Packages that not everybody has installed: imported where they are used, and named with what brings them."""

from __future__ import annotations

import importlib
from typing import Any

EXTRAS = {
    "transformers": "transformers",
    "safetensors": "transformers",
    "datasets": "train",
    "peft": "train",
    "yaml": "train",
}


def need(package: str, who: str) -> Any:
    """The module; `who` begins the error where it is not there."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise ImportError(f"{who} needs {name}: pip install nlhf-kernels[{EXTRAS[name]}]") from error
