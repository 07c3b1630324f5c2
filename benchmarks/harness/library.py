"""The harness's interface to the library: which backends can run a call, and calls of one backend."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

BACKENDS = ("torch", "triton", "cuda", "cpu")


@dataclass(frozen=True)
class BackendReport:
    """Backend -> reasons why it cannot run this call (empty: it can), and the backend that `auto` selects."""

    reasons: Mapping[str, list[str]]
    chosen: str | None


def backend_report(op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BackendReport:
    """Report on this call. An exception of the library becomes the reason of every backend."""
    try:
        library = importlib.import_module("nlhf_kernels")
        if not hasattr(library, op):
            raise AttributeError(f"nlhf_kernels has no function {op}")
        explanation = library.explain(op, *args, **kwargs)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        return BackendReport({backend: [reason] for backend in BACKENDS}, None)
    return BackendReport({name: list(reasons) for name, reasons in explanation.reasons.items()}, explanation.chosen)


def backend_call(op: str, backend: str) -> Callable[..., Any]:
    """Return the library's public function, bound to one backend."""
    return partial(getattr(importlib.import_module("nlhf_kernels"), op), backend=backend)


def native_function(module: str, name: str) -> Callable[..., Any] | str:
    """Return a function of a native module (`_cpu`, `_cuda`), for timing that layer alone, or why there is none."""
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(f"nlhf_kernels.{module}"), name)
    except (ImportError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return function
