"""The user's settings: the backend, the SIMD level, and the environment variables with their defaults.

This is the only file of the package that reads the environment (a test asserts it), once, at import.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from .checks import check_option

BACKENDS = ("torch", "triton", "cuda", "cpu")
CHOICES = ("auto", *BACKENDS)
SIMD_LEVELS = ("baseline", "avx2", "avx512")

#: Every variable the package reads, and what it does. `nlhf-kernels info` prints this table.
VARIABLES = {
    "NLHF_KERNELS_BACKEND": "backend of every op unless the call or use_backend says otherwise: " + ", ".join(CHOICES),
    "NLHF_KERNELS_SIMD": "highest instruction set the CPU kernels use: " + ", ".join(SIMD_LEVELS),
    "NLHF_KERNELS_TUNING": "the file of tuned launch plans instead of ~/.cache/nlhf_kernels/plans.json; off: none",
    "TRITON_INTERPRET": "1 runs Triton kernels in Triton's CPU interpreter (slow; for tests and debugging)",
}


class Request(NamedTuple):
    """A requested backend and where the request comes from, which an error names."""

    backend: str
    origin: str


def _from_environment(variable: str, default: str, allowed: tuple[str, ...]) -> str:
    return check_option("environment", variable, os.environ.get(variable, "") or default, allowed)


_default = Request(_from_environment("NLHF_KERNELS_BACKEND", "auto", CHOICES), "NLHF_KERNELS_BACKEND")
_scoped: ContextVar[Request | None] = ContextVar("nlhf_kernels_backend", default=None)

simd_level = _from_environment("NLHF_KERNELS_SIMD", "avx512", SIMD_LEVELS)
tuning = os.environ.get("NLHF_KERNELS_TUNING", "")
triton_interpret = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def environment() -> dict[str, str | None]:
    """Return the values of the variables above, for `nlhf-kernels info`."""
    return {variable: os.environ.get(variable) for variable in VARIABLES}


def set_backend(backend: str) -> None:
    """Choose the backend of every op for the whole process.

    Args:
        backend: auto (each op chooses), torch, triton, cuda or cpu.
    """
    global _default
    _default = Request(check_option("set_backend", "backend", backend, CHOICES), "set_backend")


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Choose the backend of every op called inside the `with` block, in this thread or task only.

    Args:
        backend: auto (each op chooses), torch, triton, cuda or cpu. One that cannot run a call raises; it never falls
            back.
    """
    token = _scoped.set(Request(check_option("use_backend", "backend", backend, CHOICES), "use_backend"))
    try:
        yield
    finally:
        _scoped.reset(token)


def requested(argument: str | None) -> Request:
    """Return the backend to use: the call's own argument, else that of `use_backend`, else the process's."""
    if argument:
        return Request(argument, "the argument backend")
    return _scoped.get() or _default
