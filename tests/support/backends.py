"""Run one test body on all backends; a backend that cannot run a call is skipped with its reasons."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nlhf_kernels
from nlhf_kernels.core.settings import BACKENDS

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
SIMD_LEVELS = ("baseline", "avx2", "avx512")

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_rival = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])


def device_of(backend: str) -> torch.device:
    """Return the device on which a backend is tested: the CPU for the CPU backend, even on a machine with a GPU."""
    return torch.device("cpu") if backend == "cpu" else DEVICE


def call(op: str, backend: str, *args: Any, **kwargs: Any) -> Any:
    """Call `nlhf_kernels.<op>(..., backend=backend)`, or skip the test with the reasons why it cannot run."""
    reasons = nlhf_kernels.explain(op, *args, **kwargs).reasons[backend]
    if reasons:
        pytest.skip(f"{op} on {backend}: {'; '.join(reasons)}")
    return getattr(nlhf_kernels, op)(*args, backend=backend, **kwargs)
