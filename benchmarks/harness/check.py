"""Error measures of the correctness gate: errors against a float64 truth, bounded in proportion to eager's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

Tensors = tuple[torch.Tensor, ...]

#: Added to the allowed error: a few roundings of the dtype, since eager may happen to be exact.
ROUNDINGS = {"float64": 1e-14, "float32": 2e-6, "bfloat16": 1.6e-2, "float16": 2e-3}
#: The allowed error of eager itself, and of every implementation if eager has no error to compare with.
SANE = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
BLOCK = 1 << 26  # entries compared at a time


@dataclasses.dataclass(frozen=True)
class CheckResult:
    ok: bool
    error: float
    allowed: float


@dataclasses.dataclass(frozen=True)
class CheckContext:
    """What a check may use in addition to result and truth."""

    dtype: str
    mode: str
    eager_error: float | None  # None: this is eager, or eager could not run or was wrong


Check = Callable[[Tensors, Tensors, CheckContext], CheckResult]


def tensors_of(result: Any) -> Tensors:
    """Return the tensors of a result in order: of a tensor, a sequence, a mapping or a dataclass."""
    if isinstance(result, torch.Tensor):
        return (result,)
    if isinstance(result, Mapping):
        result = list(result.values())
    elif dataclasses.is_dataclass(result):
        result = [getattr(result, entry.name) for entry in dataclasses.fields(result)]
    if isinstance(result, (tuple, list)):
        return tuple(tensor for entry in result for tensor in tensors_of(entry))
    return ()


def relative_error(result: Tensors, truth: Tensors) -> float:
    """Return the largest deviation of any entry, relative to the largest true entry of its tensor.

    It is infinite if shapes differ, if the two are not finite at the same entries, or if integers differ.
    """
    if len(result) != len(truth) or any(ours.shape != true.shape for ours, true in zip(result, truth, strict=True)):
        return float("inf")
    return max((_tensor_error(ours, true) for ours, true in zip(result, truth, strict=True)), default=float("inf"))


def _tensor_error(ours: torch.Tensor, true: torch.Tensor) -> float:
    if not true.is_floating_point():
        return 0.0 if torch.equal(ours.to(true.dtype), true) else float("inf")
    blocks = zip(ours.detach().reshape(-1).split(BLOCK), true.reshape(-1).split(BLOCK), strict=True)
    block_errors = [_block_error(*pair) for pair in blocks]  # a float64 copy of a large tensor would not fit beside it
    error, scale = (max((entry[part] for entry in block_errors), default=0.0) for part in (0, 1))
    return error / (scale or 1.0)


def _block_error(ours: torch.Tensor, true: torch.Tensor) -> tuple[float, float]:
    """Return the largest deviation and the largest true entry."""
    ours, true = ours.to(torch.float64), true.to(torch.float64)
    finite = true.isfinite()
    same_elsewhere = torch.equal(ours[~finite].nan_to_num(nan=0.0), true[~finite].nan_to_num(nan=0.0))
    if not same_elsewhere or not torch.equal(ours.isnan(), true.isnan()) or not bool(ours[finite].isfinite().all()):
        return float("inf"), 1.0
    if not bool(finite.any()):
        return 0.0, 0.0
    return float((ours[finite] - true[finite]).abs().max()), float(true[finite].abs().max())


def accuracy_check(
    factor: float = 2.0, roundings: Mapping[str, float] = ROUNDINGS, sane: Mapping[str, float] = SANE
) -> Check:
    """Make a check of error <= factor * eager's error + ROUNDINGS; eager's own error must not exceed SANE."""

    def check(result: Tensors, truth: Tensors, context: CheckContext) -> CheckResult:
        error = relative_error(result, truth)
        if context.eager_error is None:
            allowed = sane[context.dtype]
        else:
            allowed = factor * context.eager_error + roundings[context.dtype]
        return CheckResult(error <= allowed, error, allowed)

    return check


def exact_check(result: Tensors, truth: Tensors, context: CheckContext) -> CheckResult:
    """Require bitwise equality with the truth: for random numbers, indices and copies."""
    error = relative_error(result, truth)
    return CheckResult(error == 0.0, error, 0.0)
