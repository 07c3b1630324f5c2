"""Operators: how a room's function becomes `torch.ops.nlhf_kernels.<name>`, opaque to torch.compile and cheap to call.

`define` registers schema, implementation and fake with `torch.library.Library`, which is cheaper to call than
`torch.library.custom_op`; `benchmarks/cases/row_uniforms.py` measures what a call costs. The backend is chosen inside
the operator, so a compiled graph holds no choice and a `use_backend` around it still counts.

`differentiable` puts an autograd Function over operators defined this way. It is left out of the call where no input
asks for a gradient; `backward` is told which inputs ask and computes nothing for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

NAMESPACE = "nlhf_kernels"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")

Operator = Callable[..., Any]

#: What runs behind each operator, for tests that watch it: PyTorch's modes see an operator's call, not its insides.
IMPLEMENTATIONS: dict[Operator, Operator] = {}


def define(name: str, signature: str, run: Operator, fake: Operator) -> Operator:
    """Register `torch.ops.nlhf_kernels.<name>` and return it.

    signature  as in `(Tensor x, float scale, str backend) -> Tensor`
    run        runs eagerly on CPU and CUDA tensors; may not alias an input in its output
    fake       the outputs' shapes, dtypes and devices for the same arguments, without reading values
    """
    _library.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    operator: Operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    IMPLEMENTATIONS[operator] = run
    return operator


def differentiable(
    forward: Operator,
    save: Callable[..., Sequence[torch.Tensor | None]],
    backward: Callable[..., Sequence[torch.Tensor | None]],
    visible: Operator = lambda output: output,
) -> Operator:
    """`forward` with a gradient.

    forward   an operator; called with positional arguments
    visible   output -> the part of it that the caller gets; the rest exists for `save`
    save      (inputs, output) -> the tensors that backward needs
    backward  (needs, saved, inputs, *upstream) -> one gradient or None per input, where `needs[i]` says whether input
              i asks for one and `inputs` holds the non-tensor arguments (tensors in it are None: they were not saved)
    """

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = forward(*inputs)
            ctx.save_for_backward(*save(inputs, output))
            ctx.plain = tuple(None if isinstance(value, torch.Tensor) else value for value in inputs)
            return visible(output)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *upstream: Any) -> Any:
            return tuple(backward(ctx.needs_input_grad, ctx.saved_tensors, ctx.plain, *upstream))

    def call(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
            return Differentiable.apply(*inputs)  # type: ignore[no-untyped-call]
        return visible(forward(*inputs))

    return call
