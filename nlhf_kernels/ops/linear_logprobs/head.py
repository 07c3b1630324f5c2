"""The output layer of a language model: what its logits are computed with."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...core.checks import Sizes, check_number, check_tensor
from ..logprobs.layout import Transform
from ..logprobs.op import DTYPES


class Head(NamedTuple):
    """logits = softcap * tanh(scale * (hidden @ weight^T + bias) / softcap), without the tanh where softcap is 0.

    Args:
        weight ((V, D)): of the output layer.
        bias ((V,)): of the output layer, if it has one.
        scale: Cohere's logit_scale, or 1 / logits_scaling of Granite.
        softcap: final_logit_softcapping of Gemma 2; 0 is none.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0

    @property
    def transform(self) -> Transform:
        return Transform(self.scale, self.softcap)


def check_head(op: str, name: str, head: Head | torch.Tensor, sizes: Sizes, hidden: str, device: torch.device) -> Head:
    """Return `head` as a Head whose tensors fit; `hidden` is the symbol of the hidden size it must have."""
    head = Head(head) if isinstance(head, torch.Tensor) else head
    if not isinstance(head, Head):
        raise TypeError(f"{op}: {name}: expected a Head or its weight (vocabulary, hidden); got {type(head).__name__}")
    check_tensor(op, f"{name}.weight", head.weight, ("vocabulary", hidden), DTYPES, sizes, device)
    if head.bias is not None:
        check_tensor(op, f"{name}.bias", head.bias, ("vocabulary",), DTYPES, sizes, device)
    check_number(op, f"{name}.scale", head.scale, 0.0, open_low=True)
    check_number(op, f"{name}.softcap", head.softcap, 0.0)
    return head
