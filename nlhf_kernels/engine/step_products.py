"""Linear layers of a step by `decode_linear`: where `nlhf-kernels tune` measured Triton faster than cuBLAS, or all.

A layer's forward is replaced during a rollout, and joint products (joint_products.py) take the same function. Inputs of
more vectors than a step has, as prompts are, go to PyTorch's product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch

from ..core.checks import FLOATS
from ..core.vocabulary import is_dtensor
from ..ops import decode_linear
from ..ops.decode_linear.op import LEAST_ROWS, MAX_ROWS, DecodeLinearProblem, measured_faster
from .contexts import replaced_forwards
from .pairs import Layer, Product, two_products
from .peft_models import adapted_layers

Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


class StepProducts:
    """The linear layers of several models that `decode_linear` computes; models with adapters have none.

    Args:
        models: whole models, whose weights are in this process.
        everywhere: all layers on Triton; else those for which a plan has been measured faster.
    """

    def __init__(self, models: Sequence[torch.nn.Module], everywhere: bool) -> None:
        self.everywhere = everywhere
        #: The same functions for every rollout: a compiled model is compiled anew for others.
        self.forwards: list[tuple[torch.nn.Linear, Callable[[torch.Tensor], torch.Tensor]]] = []
        for model in {id(model): model for model in models}.values():
            for layer in model.modules() if not adapted_layers(model) else ():
                if type(layer) is torch.nn.Linear and (linear := self.linear_for(layer.weight)) is not None:
                    self.forwards.append((layer, partial(_forward, layer, linear)))

    def linear_for(self, weight: torch.Tensor) -> Linear | None:
        """Return the product with this weight; None where PyTorch's is taken for every number of rows."""
        backend = self._backend_for(weight, 1)
        return None if backend is None else _LINEAR[backend]

    def product_for(self, weight: torch.Tensor) -> Product | None:
        """Return the product with this weight and another model's of the same shape; None where PyTorch's are taken."""
        backend = self._backend_for(weight, 2)
        return None if backend is None else partial(_few_rows_of_two, backend)

    def _backend_for(self, weight: torch.Tensor, weights: int) -> str | None:
        if is_dtensor(weight) or weight.dtype not in FLOATS:
            return None
        if self.everywhere:
            return "triton"
        columns, width = weight.shape
        problem = DecodeLinearProblem(weight.device, weight.dtype, LEAST_ROWS, width, columns, weights)
        rows = [LEAST_ROWS]
        while rows[-1] < MAX_ROWS:
            rows.append(2 * rows[-1])
        return "auto" if any(measured_faster(problem._replace(rows=count)) for count in rows) else None

    def applied(self) -> AbstractContextManager[None]:
        """Replace the forwards, except those that are replaced already, by joint products or another library."""
        return replaced_forwards(self.forwards)


def _forward(layer: torch.nn.Linear, linear: Linear, x: torch.Tensor) -> torch.Tensor:
    return linear(x, layer.weight, layer.bias)


def _as_measured(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return _few_rows(x, weight, bias, "auto")


def _on_triton(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return _few_rows(x, weight, bias, "triton")


_LINEAR = {"auto": _as_measured, "triton": _on_triton}


def _few_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, backend: str
) -> torch.Tensor:  # (..., D) -> (..., N)
    width = x.shape[-1]
    if x.numel() > MAX_ROWS * width:
        return torch.nn.functional.linear(x, weight, bias)
    return decode_linear(x.reshape(-1, width), weight, bias, backend=backend).view(*x.shape[:-1], len(weight))


def _few_rows_of_two(backend: str, x: torch.Tensor, first: int, layer: Layer, other: Layer) -> torch.Tensor:
    if max(first, len(x) - first) > MAX_ROWS:
        return two_products(x, first, layer, other)
    return decode_linear(x, layer.weight, layer.bias, other.weight, other.bias, first, backend=backend)
