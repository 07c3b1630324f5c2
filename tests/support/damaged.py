"""Folders of saved models with damaged weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def damaged(folder: Path, copy: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> str:
    """Copy `folder` with `change` applied to its weights."""
    shutil.copytree(folder, copy)
    (path,) = copy.glob("*model.safetensors")
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})
    return str(copy)


def lacking(weights: dict[str, torch.Tensor]) -> None:
    """Remove a weight: transformers and peft would draw a random one."""
    del weights[_inner(weights)]


def nan(weights: dict[str, torch.Tensor]) -> None:
    weights[_inner(weights)][0, 0] = torch.nan


def _inner(weights: dict[str, torch.Tensor]) -> str:
    return max(name for name, value in weights.items() if value.ndim == 2 and "layers." in name)
