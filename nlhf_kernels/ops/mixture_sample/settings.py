"""Sampling settings: numbers or per-row tensors, checked and packed into one small tensor on the device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from ...core.checks import Sizes, check_number, check_tensor
from ...core.native import cuda_stream

Number = float | torch.Tensor  # one for all rows, or (R,)


class MixtureSettings(NamedTuple):
    """Sampling settings on the device, packed once for every step by `mixture_settings`.

    Args:
        packed ((R or 1, 4 + models) float32): temperature, top_k, top_p, min_p, weights.
        filtered: whether any row has a filter.
    """

    packed: torch.Tensor
    filtered: bool


def mixture_settings(
    weights: Sequence[Number],
    *,
    temperature: Number = 1.0,
    top_k: Number = 0,
    top_p: Number = 1.0,
    min_p: Number = 0.0,
    device: torch.device,
    rows: int | None = None,
    op: str = "mixture_settings",
) -> MixtureSettings:
    """Check and pack the settings of `mixture_sample` and `log_linear_sample`.

    Values inside tensors are not checked: reading them would wait for the GPU. Tensors for filters count as filtering.

    Args:
        weights (numbers or (R,)): one per model: (1 - beta, beta) for the policy and the reference of Nash-MD.
        temperature (number or (R,)): above 0; 0 takes the likeliest token.
        top_k (number or (R,)): whole number; 0 keeps all tokens.
        top_p (number or (R,)): in (0, 1]; 1 keeps all tokens.
        min_p (number or (R,)): in [0, 1]; 0 keeps all tokens.
        device: where the samplers will run.
        rows: R, which tensors must have; None takes theirs.
        op: what errors name.
    """
    numbers: tuple[Any, ...] = (temperature, top_k, top_p, min_p, *weights)
    if _NUMBERS.issuperset(map(type, numbers)) and not torch.compiler.is_compiling():
        filtered = _filtered_by(numbers, op)
        return MixtureSettings(_pack_numbers(numbers, device), filtered)
    sizes: Sizes = {} if rows is None else {"rows": rows}
    for name, value in zip(_names(len(weights)), numbers, strict=True):
        if isinstance(value, torch.Tensor):
            check_tensor(op, name, value, ("rows",) if value.ndim else (), _DTYPES, sizes, device)
        else:
            _check_value(op, name, value)
    filtered = has_filter(top_k, top_p, min_p)
    if any(isinstance(value, torch.Tensor) for value in numbers):
        per_row = any(isinstance(value, torch.Tensor) and value.ndim for value in numbers)
        return MixtureSettings(_pack_columns(numbers, sizes["rows"] if per_row else 1, device), filtered)
    return MixtureSettings(_pack_columns(tuple(map(float, numbers)), 1, device), filtered)


_NUMBERS = frozenset((int, float))


@lru_cache(maxsize=256)
def _filtered_by(numbers: tuple[float, ...], op: str) -> bool:
    """Check numbers in the order of the packed columns; return whether there is a filter."""
    for name, value in zip(_names(len(numbers) - 4), numbers, strict=True):
        _check_value(op, name, value)
    return has_filter(*numbers[1:4])


def _names(weights: int) -> tuple[str, ...]:
    return ("temperature", "top_k", "top_p", "min_p", *(f"weights[{m}]" for m in range(weights)))


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32)


def has_filter(top_k: Number, top_p: Number, min_p: Number) -> bool:
    """Return whether any of the three filters; a tensor counts as filtering, its values are not read."""
    return any(isinstance(value, torch.Tensor) or value != off for value, off in ((top_k, 0), (top_p, 1), (min_p, 0)))


def _check_value(op: str, name: str, value: object) -> None:
    if name == "temperature":
        check_number(op, name, value, 0.0)
    elif name == "top_k":
        if check_number(op, name, value, 0, 2**24) != int(value):  # type: ignore[call-overload]
            raise ValueError(f"{op}: top_k: expected a whole number, 0 for no filter; got {value}")
    elif name == "top_p":
        check_number(op, name, value, 0.0, 1.0, open_low=True)
    elif name == "min_p":
        check_number(op, name, value, 0.0, 1.0)
    else:
        check_number(op, name, value)


def _pack_columns(columns: Sequence[Number], rows: int, device: torch.device) -> torch.Tensor:
    """Pack (rows, columns) without a copy from the host: a number fills its column."""
    packed = torch.empty((rows, len(columns)), dtype=torch.float32, device=device)
    for index, column in enumerate(columns):
        if isinstance(column, torch.Tensor):
            packed[:, index].copy_(column)
        else:
            packed[:, index].fill_(column)
    return packed


@lru_cache(maxsize=256)
def _pack_cached(numbers: tuple[float, ...], device: torch.device, stream: int) -> torch.Tensor:
    return _pack_columns(numbers, 1, device)


def _pack_numbers(numbers: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return the packed numbers, cached per stream: another stream could read them before they are written.
    Nothing is cached during a graph capture: the graph owns that memory."""
    if device.type != "cuda":
        return _pack_cached(numbers, device, 0)
    if torch.cuda.is_current_stream_capturing():
        return _pack_columns(numbers, 1, device)
    return _pack_cached(numbers, device, cuda_stream(device))
