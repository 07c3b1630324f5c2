"""Argument checks: each error names the op and the argument, what was expected, and what was passed.

They run on every call, so they check shapes, dtypes and devices only: reading a tensor's values would wait for the GPU.
`sizes` carries the sizes of symbolic dimensions from one argument to the next.

Operators, `torch.ops.nlhf_kernels.<op>`, can be called without the public function, and their kernels read memory by
address. So an operator checks its arguments itself. Where the public function's arguments differ from
the operator's (in shape or name), both are checked, the operator's by `check_memory`, which is cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .text import excerpt

Sizes = dict[str, int]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
REALS = (torch.float32, torch.float64)
INTEGERS = (torch.int64,)
_DENSE = torch.strided


def check_tensor(
    op: str,
    name: str,
    value: object,
    shape: Sequence[str],
    dtypes: Sequence[torch.dtype],
    sizes: Sizes,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Return `value`, a tensor of the symbolic `shape`, one of `dtypes`, on `device`; bind new symbols in `sizes`."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name}: expected a tensor of shape ({', '.join(shape)}); got {type(value).__name__}")
    got = value.shape
    if len(got) != len(shape):
        _raise_shape(op, name, value, shape, sizes)
    for symbol, size in zip(shape, got):  # noqa: B905  (lengths are equal; `strict` costs on every call)
        if sizes.setdefault(symbol, size) != size:
            _raise_shape(op, name, value, shape, sizes)
    if value.dtype in dtypes and (device is None or value.device == device) and value.layout is _DENSE:
        return value
    if value.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name}: expected dtype {expected}; got {str(value.dtype).removeprefix('torch.')}")
    if device is not None and value.device != device:
        raise ValueError(
            f"{op}: {name}: expected a tensor on {device}, where the other arguments are; got {value.device}"
        )
    raise TypeError(f"{op}: {name}: expected a dense tensor; got layout {value.layout}")


def _raise_shape(op: str, name: str, value: torch.Tensor, shape: Sequence[str], sizes: Sizes) -> None:
    known = ", ".join(f"{symbol}={sizes[symbol]}" for symbol in dict.fromkeys(shape) if symbol in sizes)
    where = f" with {known}" if known and len(value.shape) == len(shape) else ""
    raise ValueError(f"{op}: {name}: expected shape ({', '.join(shape)}){where}; got {tuple(value.shape)}")


def check_memory(
    op: str,
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    strides: str = "contiguous",  # or "rows": elements of the last dimension are neighbours; "any"
) -> None:
    """Check what a kernel relies on: shape, dtype, device and strides."""
    if tensor.shape != shape or tensor.dtype not in dtypes or tensor.device != device:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        got = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{op}: {name}: expected {expected} {tuple(shape)} on {device}; got {got}")
    if tensor.is_contiguous() or strides == "any":
        return
    if strides == "contiguous" or (tensor.stride()[-1] != 1 and shape[-1] > 1):
        got = f"{tuple(shape)} with strides {tensor.stride()}"
        raise ValueError(f"{op}: {name}: expected neighbouring elements next to each other in memory; got {got}")


def overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two matrices with contiguous rows share memory. Interleaved rows do not."""
    if one.device != other.device or not one.numel() or not other.numel():
        return False
    if one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
        return False
    distance = other.data_ptr() - one.data_ptr()  # all in bytes, from here on
    (length, stride), (other_length, other_stride) = _row_bytes(one), _row_bytes(other)
    if distance >= (len(one) - 1) * stride + length or -distance >= (len(other) - 1) * other_stride + other_length:
        return False
    if stride == other_stride and stride > 0:
        offset = distance % stride  # of a row of `other` in a row of `one`
        return offset < length or offset + other_length > stride
    return True  # intervals overlap; rows of different strides may still be disjoint, which is not checked


def _row_bytes(matrix: torch.Tensor) -> tuple[int, int]:
    return matrix.shape[1] * matrix.element_size(), matrix.stride()[0] * matrix.element_size()


def check_counter(
    op: str, seed: torch.Tensor, row_ids: torch.Tensor, step: torch.Tensor, sizes: Sizes, device: torch.device
) -> None:
    """Check the counter of random numbers: row_ids (rows,); seed and step () or (rows,); int64."""
    shape = row_ids.shape
    if (
        len(shape) == 1
        and sizes.setdefault("rows", shape[0]) == shape[0]
        and row_ids.dtype == seed.dtype == step.dtype == torch.int64
        and row_ids.device == seed.device == step.device == device
        and (not seed.ndim or seed.shape == shape)
        and (not step.ndim or step.shape == shape)
    ):
        return
    # One of these raises with the reason.
    check_tensor(op, "row_ids", row_ids, ("rows",), INTEGERS, sizes, device)
    check_tensor(op, "seed", seed, ("rows",) if seed.ndim else (), INTEGERS, sizes, device)
    check_tensor(op, "step", step, ("rows",) if step.ndim else (), INTEGERS, sizes, device)


def check_is_tensor(op: str, name: str, value: object) -> None:
    """Check that `value` is a dense tensor; for others PyTorch's own error would not name the argument."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name}: expected a tensor; got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{op}: {name}: expected a dense tensor; got layout {value.layout}")


def check_not_empty(op: str, name: str, sizes: Sizes, *symbols: str) -> None:
    for symbol in symbols:
        if sizes[symbol] == 0:
            raise ValueError(f"{op}: {name}: expected at least one of {symbol}; got 0")


def check_number(
    op: str, name: str, value: object, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False
) -> float:
    """Return `value`, a finite number in [low, high], or in (low, high] where `open_low`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name}: expected a number; got {type(value).__name__}")
    finite = -math.inf < value < math.inf  # not math.isfinite, which torch.compile cannot trace for a dynamic float
    inside = finite and (low < value if open_low else low <= value) and value <= high
    if not inside:
        bounded = math.isfinite(low) or math.isfinite(high)
        interval = f" in {'(' if open_low else '['}{low}, {high}{')' if math.isinf(high) else ']'}" if bounded else ""
        raise ValueError(f"{op}: {name}: expected a finite number{interval}; got {value}")
    return float(value)


def check_integer(op: str, name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name}: expected an integer; got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{op}: {name}: expected an integer in [{low}, {high}]; got {value}")
    return value


def check_option(op: str, name: str, value: object, allowed: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{op}: {name}: expected one of {', '.join(allowed)}; got {excerpt(value)}")
    return value


def check_switch(op: str, name: str, value: object, words: Sequence[str]) -> None:
    """Check an argument that is one of `words`, True or False."""
    if not isinstance(value, bool) and value not in words:
        raise ValueError(f"{op}: {name}: expected {', '.join(words)}, True or False; got {excerpt(value)}")
