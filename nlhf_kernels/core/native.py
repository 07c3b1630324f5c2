"""What a call into `_cuda` needs from PyTorch: the current stream and the right current device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def cuda_stream(device: torch.device) -> int:
    """PyTorch's current stream on `device`, as the address the launchers take."""
    return torch.cuda.current_stream(device).cuda_stream


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes `device` current; free where it already is."""
    if device.index is None or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
