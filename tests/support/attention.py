"""The kernels that PyTorch's attention may choose from during training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook


@contextmanager
def cudnn_while_learning() -> Iterator[set[bool]]:
    """Record whether attention's forward passes with gradients, including recomputed ones, may use cuDNN."""
    seen: set[bool] = set()

    def look(module: torch.nn.Module, arguments: Any) -> None:
        if torch.is_grad_enabled() and type(module).__name__.endswith("Attention"):
            seen.add(torch.backends.cuda.cudnn_sdp_enabled())

    hook = register_module_forward_pre_hook(look)
    try:
        yield seen
    finally:
        hook.remove()
