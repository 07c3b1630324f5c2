"""What subcommands share: the device by name."""

from __future__ import annotations

import torch

from .errors import BadInput


def find_device(command: str, name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, dtype=torch.uint8, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: a CPU build of PyTorch that is asked for CUDA
        raise BadInput(f"{command}: --device: expected a device PyTorch can use here; got {name!r}") from error
