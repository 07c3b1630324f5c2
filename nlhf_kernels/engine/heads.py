"""A head over a handful of rows on the CPU: weights x hidden states instead of hidden states x weights.

The head is most of a small model's step. With 7 to 15 rows in float32 the library behind PyTorch packs the whole weight
matrix for one narrow product; with the operands the other way round it does not. With
fewer rows or more the usual order is as fast or faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

ROWS = range(7, 16)


@contextmanager
def weights_first(models: Sequence[Any]) -> Iterator[None]:
    """Plain float32 heads on the CPU, for a while; whatever else a head is, it stays as it is."""
    heads = {head for head in map(_head, models) if head is not None}
    for head in heads:
        head.forward = _forward(head)
    try:
        yield
    finally:
        for head in heads:
            del head.forward  # the class's own again


def _head(model: Any) -> Any:
    head = model.get_output_embeddings()
    plain = type(head) is torch.nn.Linear and "forward" not in vars(head)
    return head if plain and head.weight.device.type == "cpu" and head.weight.dtype == torch.float32 else None


def _forward(head: torch.nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    usual = head.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) not in ROWS or head.bias is not None or x.dtype != torch.float32:
            return usual(x)
        return (head.weight @ flat.T).T.contiguous().view(*x.shape[:-1], -1)

    return forward
