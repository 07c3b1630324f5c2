"""What is asked of transformers beyond its documented interface, with the versions it was seen in.

Each entry has a contract test of its own in tests/test_upstream.py, which fails by its name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

#: What a model's forward and generate() call a Cache. transformers 5.17 to 5.23: the first, and the second in recurrent
#: models; 5.24: the third, in all of them.
CACHES = ("past_key_values", "cache_params", "cache")


def cache_argument(forward: Callable[..., Any]) -> str | None:
    """Return the name of the argument by which `forward` takes a Cache of transformers, or None.

    XLM and Flaubert take a `cache` that is a dict, in all of transformers 5.17 to 5.24.
    """
    parameters = inspect.signature(forward).parameters
    names = [name for name in CACHES if name in parameters and "dict" not in str(parameters[name].annotation)]
    return names[0] if names else None
