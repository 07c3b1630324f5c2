"""decode_linear: a linear layer over the few rows of a decoding step, or two of one shape, against PyTorch."""

from __future__ import annotations

import torch

from ..harness.case import Baseline, Case, Inputs, Shape


def make(shape: Shape, device: torch.device, generator: torch.Generator) -> Inputs:
    """With two weights each takes half of the rows, as policy and reference do in one pass."""
    rows, width, columns, weights = _sizes(shape)
    x, *matrices = (
        torch.randn(count, width, device=device, generator=generator).to(shape.torch_dtype)
        for count in (rows, *[columns] * weights)
    )
    return Inputs((x, matrices[0])) if weights == 1 else Inputs((x, matrices[0], None, matrices[1], None, rows // 2))


def _sizes(shape: Shape) -> list[int]:
    return [*(int(shape.sizes[name]) for name in ("rows", "width", "columns")), int(shape.sizes.get("weights", 1))]


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: None = None,
    rest_weight: torch.Tensor | None = None,
    rest_bias: None = None,
    first: int = 0,
) -> torch.Tensor:
    """Compute the product by PyTorch, or that of each half of the rows, into one result."""
    if rest_weight is None:
        return torch.nn.functional.linear(x, weight)
    out = x.new_empty(len(x), len(weight))
    torch.mm(x[:first], weight.T, out=out[:first])
    torch.mm(x[first:], rest_weight.T, out=out[first:])
    return out


def bytes_moved(shape: Shape, mode: str) -> float:
    """Count one read of the weights and of the vectors, and one write of the result."""
    rows, width, columns, weights = _sizes(shape)
    return float(shape.torch_dtype.itemsize * (weights * width * columns + rows * (width + columns)))


def flops(shape: Shape, mode: str) -> float:
    return 2.0 * int(shape.sizes["rows"]) * int(shape.sizes["width"]) * int(shape.sizes["columns"])


def _shape(rows: int, width: int, columns: int, **more: int) -> Shape:
    return Shape({"rows": rows, "width": width, "columns": columns, **more}, "bfloat16", devices=("cuda",))


CASE = Case(
    name="decode_linear",
    op="decode_linear",
    shapes={
        "tiny": [Shape({"rows": 2, "width": 40, "columns": 30, **weights}) for weights in ({}, {"weights": 2})],
        "standard": [  # query, key and value; output projection; gate and up; down; head
            *(_shape(32, *sizes) for sizes in ((896, 1152), (896, 896), (896, 9728), (4864, 896), (896, 151_936))),
            *(_shape(32, *sizes) for sizes in ((3584, 4608), (3584, 3584), (3584, 37_888), (18_944, 3584))),
            _shape(16, 896, 896),
            _shape(64, 896, 896),
            *(_shape(64, *sizes, weights=2) for sizes in ((896, 1152), (896, 896), (896, 9728), (4864, 896))),
            *(_shape(64, *sizes, weights=2) for sizes in ((896, 151_936), (3584, 4608), (3584, 37_888))),
            Shape({"rows": 8, "width": 896, "columns": 4864}, devices=("cpu",)),
        ],
    },
    make=make,
    truth=linear,
    baselines={"eager": Baseline(linear)},
    compiled=lambda: torch.compile(linear),
    bytes_moved=bytes_moved,
    flops=flops,
)
