"""Evaluation mode of models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .upstream import modules_of


@contextmanager
def eval_mode(*models: torch.nn.Module) -> Iterator[None]:
    """Put models into evaluation mode, and the submodules that were in training mode back into it afterwards.

    Evaluation mode switches off dropout, and gradient checkpointing, under which models do not use their caches. A
    model without such a submodule is left alone: to set a flag that is set costs a large model milliseconds.
    """
    in_training = {model: [module for module in modules_of(model) if module.training] for model in models}
    try:
        for model, modules in in_training.items():
            if modules:
                model.eval()
        yield
    finally:
        for modules in in_training.values():
            for module in modules:
                module.training = True
