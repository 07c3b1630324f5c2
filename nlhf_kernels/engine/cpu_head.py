"""The language model's head over a few rows on the CPU: weights x hidden states instead of hidden states x weights.

The head is most of a small model's step. With 7 to 15 rows in float32, MKL packs the whole weight matrix for one narrow
product; with the operands swapped it does not. With fewer rows or more the usual order is as fast or faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from .contexts import replaced_forwards

ROWS = range(7, 16)


def fast_cpu_heads(models: Sequence[Any]) -> AbstractContextManager[None]:
    """Replace the forward of these models' heads where they are plain float32 linear layers on the CPU."""
    heads = {head for model in models if is_plain(head := model.get_output_embeddings())}
    return replaced_forwards([(head, _weights_first(head)) for head in heads])


def is_plain(head: Any) -> bool:
    """Whether a head is a plain float32 linear layer on the CPU."""
    linear = type(head) is torch.nn.Linear
    return linear and head.weight.device.type == "cpu" and head.weight.dtype == torch.float32


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:  # (R, D), (V, D) -> (R, V), R in ROWS
    """x weight^T, computed as (weight x^T)^T."""
    return (weight @ x.T).T


def _weights_first(head: torch.nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    usual = head.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) not in ROWS or head.bias is not None or x.dtype != torch.float32:
            return usual(x)
        return product(flat, head.weight).contiguous().view(*x.shape[:-1], -1)

    return forward
