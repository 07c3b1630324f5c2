"""decode_linear in Triton: a program per block of columns, split of the width and weight; then a sum of the splits.

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


def default_plan(rows: int, columns: int, width: int, itemsize: int, weights: int = 1) -> Plan:
    """Choose tiles by arithmetic: not measured.

    A program reads its columns of the weight and all of x. With twice as many columns as rows, x, which comes from the
    L2 cache, is a third of that. A row of a tile is a cache line. The width is split until the programs fill a large
    GPU, but not below two tiles.
    """
    block = max(32, 2 * rows)
    depth = 128 // itemsize
    splits = 1
    while splits < 16 and -(-columns // block) * weights * splits * 2 <= _PROGRAMS and width >= 4 * splits * depth:
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
    rest_weight,  # of all rows but the first, where TWO
    rest_bias,
    out,  # (rows, columns); with splits (SPLITS, rows, columns) float32, without the bias
    rows, first, columns, width, weight_row, rest_weight_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SPLITS: tl.constexpr, WHOLE: tl.constexpr,
    HAS_BIAS: tl.constexpr, TWO: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row, lane = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    tiles = tl.cdiv(tl.cdiv(width, DEPTH), SPLITS)  # of a split
    begin = split * tiles * DEPTH
    end = tl.minimum(width, begin + tiles * DEPTH)
    # Rows and columns past the end read the last one again: loads stay whole vectors, and their sums are not stored.
    stored = tl.minimum(column, columns - 1).to(tl.int64)
    weight_at, bias_at = weight + stored * weight_row, bias + column
    end_row = rows
    if TWO:
        is_rest = tl.program_id(2) == 1
        row += tl.where(is_rest, first, 0)
        end_row = tl.where(is_rest, rows, first)
        weight_at = tl.where(is_rest, rest_weight + stored * rest_weight_row, weight_at)
        bias_at = tl.where(is_rest, rest_bias + column, bias_at)
    x_at = x + tl.minimum(row, end_row - 1)[:, None] * width + (begin + lane)[None, :]
    weight_at = weight_at[:, None] + (begin + lane)[None, :]
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
        sums += tl.load(bias_at, mask=inside, other=0.0).to(tl.float32)[None, :]
    target = (split * rows + row).to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out + target, sums.to(out.dtype.element_ty), mask=(row < end_row)[:, None] & inside[None, :])


@triton.jit
def sum_kernel(
    partial,  # (SPLITS, size)
    bias,  # (columns,)
    rest_bias,  # from the result `first_size` on, where TWO
    out,  # (size,)
    columns, size, first_size,
    SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, TWO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the splits in their order, then the bias: (2)."""
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial + tl.cast(split, tl.int64) * size + element, mask=inside, other=0.0)
    if HAS_BIAS:
        of_first = inside & (element < first_size) if TWO else inside
        total += tl.load(bias + element % columns, mask=of_first, other=0.0).to(tl.float32)
        if TWO:
            total += tl.load(rest_bias + element % columns, mask=inside & ~of_first, other=0.0).to(tl.float32)
    tl.store(out + element, total.to(out.dtype.element_ty), mask=inside)


def decode_linear(inputs: DecodeLinearInputs) -> torch.Tensor:
    result: torch.Tensor = prepare(inputs)(inputs)
    return result


def prepare(inputs: DecodeLinearInputs) -> Callable[[DecodeLinearInputs], torch.Tensor]:
    """Return the function that multiplies with inputs of this signature: what depends on sizes is computed once."""
    x, weight, bias, rest_weight, _, first, _ = inputs
    (rows, width), columns, two = x.shape, weight.shape[0], rest_weight is not None
    if not rows:
        return empty_result
    problem = problem_of(*inputs[:-1])
    padded = max(LEAST_ROWS, triton.next_power_of_2(problem.rows))
    default = default_plan(padded, columns, width, x.element_size(), problem.weights)
    plan = _TUNABLE.plan(x.device, workload_of(problem), default)
    slots, out = slots_of(inputs), Slot(Source.RESULT, 0)
    partial = Result((plan.splits, rows, columns), torch.float32)
    scratch = Scratch(*([partial] if plan.splits > 1 else ()))
    written, bias_slot = scratch.slots[0] if plan.splits > 1 else out, slots.bias or slots.x
    biases = (bias_slot, slots.rest_bias or bias_slot)
    rest_row = (weight if rest_weight is None else rest_weight).stride(0)
    product = Launch(
        product_kernel, (triton.cdiv(columns, plan.columns), plan.splits, problem.weights),
        (slots.x, slots.weight, biases[0], slots.rest_weight or slots.weight, biases[1], written),
        (rows, first, columns, width, weight.stride(0), rest_row),
        {
            "ROWS": padded, "COLUMNS": plan.columns, "DEPTH": plan.depth, "SPLITS": plan.splits,
            "WHOLE": width % plan.depth == 0, "HAS_BIAS": bias is not None, "TWO": two,
            "WIDE": settings.triton_interpret,  # the interpreter multiplies the bit patterns of bfloat16
            "num_warps": plan.warps, "num_stages": plan.stages,
        },
    )  # fmt: skip
    total = Launch(
        sum_kernel, (triton.cdiv(rows * columns, _SUM_BLOCK),), (written, *biases, out),
        (columns, rows * columns, first * columns),
        {"SPLITS": plan.splits, "HAS_BIAS": bias is not None, "TWO": two, "BLOCK": _SUM_BLOCK},
    )  # fmt: skip
    launches = [product, total] if plan.splits > 1 else [product]
    return TritonCall(x.device, [Result((rows, columns), x.dtype)], scratch, launches)
