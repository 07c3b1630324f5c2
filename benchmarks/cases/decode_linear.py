"""decode_linear: a linear layer over the few rows of a decoding step, against PyTorch's product."""

from __future__ import annotations

import torch

from ..harness.case import Baseline, Case, Inputs, Shape


def make(shape: Shape, device: torch.device, generator: torch.Generator) -> Inputs:
    rows, width, columns = (int(shape.sizes[name]) for name in ("rows", "width", "columns"))
    x, weight = (
        torch.randn(count, width, device=device, generator=generator).to(shape.torch_dtype) for count in (rows, columns)
    )
    return Inputs((x, weight))


def bytes_moved(shape: Shape, mode: str) -> float:
    """Count one read of the weight and of the vectors, and one write of the result."""
    rows, width, columns = (int(shape.sizes[name]) for name in ("rows", "width", "columns"))
    return float(shape.torch_dtype.itemsize * (width * columns + rows * (width + columns)))


def flops(shape: Shape, mode: str) -> float:
    return 2.0 * int(shape.sizes["rows"]) * int(shape.sizes["width"]) * int(shape.sizes["columns"])


def _shape(rows: int, width: int, columns: int) -> Shape:
    return Shape({"rows": rows, "width": width, "columns": columns}, "bfloat16", devices=("cuda",))


CASE = Case(
    name="decode_linear",
    op="decode_linear",
    shapes={
        "tiny": [Shape({"rows": 2, "width": 40, "columns": 30})],
        "standard": [  # query, key and value; output projection; gate and up; down; head
            *(_shape(32, *sizes) for sizes in ((896, 1152), (896, 896), (896, 9728), (4864, 896), (896, 151_936))),
            *(_shape(32, *sizes) for sizes in ((3584, 4608), (3584, 3584), (3584, 37_888), (18_944, 3584))),
            _shape(16, 896, 896),
            _shape(64, 896, 896),
            Shape({"rows": 8, "width": 896, "columns": 4864}, devices=("cpu",)),
        ],
    },
    make=make,
    truth=torch.nn.functional.linear,
    baselines={"eager": Baseline(torch.nn.functional.linear)},
    compiled=lambda: torch.compile(torch.nn.functional.linear),
    bytes_moved=bytes_moved,
    flops=flops,
)
