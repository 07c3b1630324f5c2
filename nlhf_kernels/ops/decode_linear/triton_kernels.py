"""decode_linear in Triton: a program per block of columns and split of the width, then a sum of the splits.

Equation numbers are those of README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...core import settings, tuning
from ...core.prepared import Result, Slot, Source, slots_of
from ...core.triton_launch import Launch, Scratch, TritonCall
from .op import LEAST_ROWS, DecodeLinearInputs, empty_result, problem_of, workload_of

_PROGRAMS = 256  # about two per multiprocessor of a large GPU
_SUM_BLOCK = 512  # results per program of the sum


class Plan(NamedTuple):
    columns: int  # of a program, a power of two
    depth: int  # elements of the width read at a time, a power of two
    splits: int  # of the width
    warps: int
    stages: int  # tiles in flight


def default_plan(rows: int, columns: int, width: int, itemsize: int) -> Plan:
    """Choose tiles by arithmetic: not measured.

    A program reads its columns of the weight and all of x. With twice as many columns as rows, x, which comes from the
    L2 cache, is a third of that. A row of a tile is a cache line. The width is split until the programs fill a large
    GPU, but not below two tiles.
    """
    block = max(32, 2 * rows)
    depth = 128 // itemsize
    splits = 1
    while splits < 16 and -(-columns // block) * splits * 2 <= _PROGRAMS and width >= 4 * splits * depth:
        splits *= 2
    return Plan(block, depth, splits, 4, 4)


def _candidates(default: Plan) -> Iterator[Plan]:
    for columns in (default.columns, max(16, default.columns // 2), 2 * default.columns):
        for splits in (default.splits, max(1, default.splits // 2), 2 * default.splits, 1):
            yield default._replace(columns=columns, splits=splits)
    yield default._replace(stages=6)
    yield default._replace(warps=8)
    for splits in (default.splits, 1):
        yield default._replace(depth=2 * default.depth, splits=splits)


_TUNABLE = tuning.Tunable("decode_linear", "triton", Plan, _candidates, rival="torch")


@triton.jit
def product_kernel(
    x,  # (rows, width)
    weight,  # (columns, width), rows of stride weight_row
    bias,  # (columns,)
    out,  # (rows, columns); with splits (SPLITS, rows, columns) float32, without the bias
    rows, columns, width, weight_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SPLITS: tl.constexpr, WHOLE: tl.constexpr,
    HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row, lane = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    tiles = tl.cdiv(tl.cdiv(width, DEPTH), SPLITS)  # of a split
    begin = split * tiles * DEPTH
    end = tl.minimum(width, begin + tiles * DEPTH)
    # Rows and columns past the end read the last one again: loads stay whole vectors, and their sums are not stored.
    x_at = x + tl.minimum(row, rows - 1)[:, None] * width + (begin + lane)[None, :]
    weight_at = weight + tl.minimum(column, columns - 1).to(tl.int64)[:, None] * weight_row + (begin + lane)[None, :]
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(begin, end, DEPTH):
        if WHOLE:
            a = tl.load(x_at)
            b = tl.load(weight_at)
        else:
            inside = start + lane < end
            a = tl.load(x_at, mask=inside[None, :], other=0.0)
            b = tl.load(weight_at, mask=inside[None, :], other=0.0)
        if WIDE:
            a, b = a.to(tl.float32), b.to(tl.float32)
        sums = tl.dot(a, tl.trans(b), sums, input_precision="ieee")
        x_at += DEPTH
        weight_at += DEPTH
    inside = column < columns
    if HAS_BIAS and SPLITS == 1:
        sums += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    target = (split * rows + row).to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out + target, sums.to(out.dtype.element_ty), mask=(row < rows)[:, None] & inside[None, :])


@triton.jit
def sum_kernel(
    partial,  # (SPLITS, size)
    bias,  # (columns,)
    out,  # (size,)
    columns, size,
    SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the splits in their order, then the bias: (2)."""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial + tl.cast(split, tl.int64) * size + element, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + element % columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + element, total.to(out.dtype.element_ty), mask=inside)


def decode_linear(inputs: DecodeLinearInputs) -> torch.Tensor:
    result: torch.Tensor = prepare(inputs)(inputs)
    return result


def prepare(inputs: DecodeLinearInputs) -> Callable[[DecodeLinearInputs], torch.Tensor]:
    """Return the function that multiplies with inputs of this signature: what depends on sizes is computed once."""
    x, weight, bias, _ = inputs
    (rows, width), columns = x.shape, weight.shape[0]
    if not rows:
        return empty_result
    padded = max(LEAST_ROWS, triton.next_power_of_2(rows))
    default = default_plan(padded, columns, width, x.element_size())
    plan = _TUNABLE.plan(x.device, workload_of(problem_of(x, weight)), default)
    slots, out = slots_of(inputs), Slot(Source.RESULT, 0)
    partial = Result((plan.splits, rows, columns), torch.float32)
    scratch = Scratch(*([partial] if plan.splits > 1 else ()))
    written, bias_slot = scratch.slots[0] if plan.splits > 1 else out, slots.bias or slots.x
    product = Launch(
        product_kernel, (triton.cdiv(columns, plan.columns), plan.splits),
        (slots.x, slots.weight, bias_slot, written), (rows, columns, width, weight.stride(0)),
        {
            "ROWS": padded, "COLUMNS": plan.columns, "DEPTH": plan.depth, "SPLITS": plan.splits,
            "WHOLE": width % plan.depth == 0, "HAS_BIAS": bias is not None,
            "WIDE": settings.triton_interpret,  # the interpreter multiplies the bit patterns of bfloat16
            "num_warps": plan.warps, "num_stages": plan.stages,
        },
    )  # fmt: skip
    total = Launch(
        sum_kernel, (triton.cdiv(rows * columns, _SUM_BLOCK),), (written, bias_slot, out), (columns, rows * columns),
        {"SPLITS": plan.splits, "HAS_BIAS": bias is not None, "BLOCK": _SUM_BLOCK},
    )  # fmt: skip
    launches = [product, total] if plan.splits > 1 else [product]
    return TritonCall(x.device, [Result((rows, columns), x.dtype)], scratch, launches)
