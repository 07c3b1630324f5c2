"""decode_linear in plain PyTorch: the oracle, and on a GPU cuBLAS's product."""

from __future__ import annotations

import torch

from .op import DecodeLinearInputs, empty_result


def decode_linear(inputs: DecodeLinearInputs) -> torch.Tensor:  # (R, N)
    if inputs.rest_weight is None:
        return torch.nn.functional.linear(inputs.x, inputs.weight, inputs.bias)
    out = empty_result(inputs)
    first = slice(0, inputs.first), inputs.weight, inputs.bias
    rest = slice(inputs.first, None), inputs.rest_weight, inputs.rest_bias
    for rows, weight, bias in (first, rest):
        if bias is None:
            torch.mm(inputs.x[rows], weight.t(), out=out[rows])
        else:
            torch.addmm(bias, inputs.x[rows], weight.t(), out=out[rows])
    return out
