"""row_uniforms: one uniform per row from Philox; mainly the cost of a call, layer by layer, against torch.rand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from ..harness.case import Baseline, Case, Inputs, Shape, Unavailable
from ..harness.check import CheckContext, CheckResult, Tensors, exact_check
from ..harness.library import native_function

STREAM = 0
WORD = 0xFFFFFFFF


def make(shape: Shape, device: torch.device, generator: torch.Generator) -> Inputs:
    rows = int(shape.sizes["rows"])
    row_ids = torch.randint(0, 1 << 40, (rows,), device=device, generator=generator)
    seed, step = torch.tensor(0x1234_5678_9ABC), torch.tensor(7)
    return Inputs((seed.to(device), row_ids, step.to(device)), {"stream": STREAM})


def truth(seed: torch.Tensor, row_ids: torch.Tensor, step: torch.Tensor, *, stream: int = 0) -> torch.Tensor:
    """Compute Philox4x32-10 in NumPy, written from the paper (Salmon et al., 2011) independently of the library."""
    key = np.uint64(int(seed) & 0xFFFFFFFFFFFFFFFF)
    key0, key1 = key & np.uint64(WORD), key >> np.uint64(32)
    rows = row_ids.cpu().numpy().astype(np.uint64)
    counter = [
        rows & np.uint64(WORD),
        rows >> np.uint64(32),
        np.full_like(rows, int(step) & WORD),
        np.full_like(rows, stream << 24),
    ]
    for _ in range(10):
        product0, product1 = np.uint64(0xD2511F53) * counter[0], np.uint64(0xCD9E8D57) * counter[2]
        counter = [
            (product1 >> np.uint64(32)) ^ counter[1] ^ key0,
            product1 & np.uint64(WORD),
            (product0 >> np.uint64(32)) ^ counter[3] ^ key1,
            product0 & np.uint64(WORD),
        ]
        key0 = (key0 + np.uint64(0x9E3779B9)) & np.uint64(WORD)
        key1 = (key1 + np.uint64(0xBB67AE85)) & np.uint64(WORD)
    upper52 = ((counter[1] << np.uint64(32)) | counter[0]) >> np.uint64(12)
    return torch.from_numpy((upper52.astype(np.float64) + 0.5) * 2.0**-52).to(row_ids.device)


def eager(seed: torch.Tensor, row_ids: torch.Tensor, step: torch.Tensor, *, stream: int = 0) -> torch.Tensor:
    """Call PyTorch's own generator: its fastest way, without the op's guarantee of a draw per row id."""
    return torch.rand(row_ids.shape, dtype=torch.float64, device=row_ids.device)


def unit_interval_check(result: Tensors, expected: Tensors, context: CheckContext) -> CheckResult:
    """Check shape and range alone, for a rival that draws from a different random stream."""
    (draws,), (example,) = result, expected
    outside = float(((draws < 0) | (draws >= 1)).sum())
    return CheckResult(draws.shape == example.shape and outside == 0, outside, 0.0)


def _bare_native(seed: torch.Tensor, row_ids: torch.Tensor, step: torch.Tensor) -> Callable[[], Any] | Unavailable:
    """Return the C++ function alone, its arguments read from the tensors beforehand."""
    function = native_function("_cpu", "row_uniforms")
    if isinstance(function, str):
        return Unavailable((function,))
    if row_ids.device.type != "cpu":
        return Unavailable((f"the tensors are on {row_ids.device}, _cpu reads host memory",))
    out = torch.empty(row_ids.shape, dtype=torch.float64)
    pointers = (seed.data_ptr(), int(seed.ndim), row_ids.data_ptr(), step.data_ptr(), int(step.ndim))
    arguments = (*pointers, STREAM, row_ids.numel(), out.data_ptr(), torch.get_num_threads())

    def bare_native(call: Callable[..., Any] = function, result: torch.Tensor = out) -> torch.Tensor:
        call(*arguments)
        return result

    return bare_native


def _operator(seed: torch.Tensor, row_ids: torch.Tensor, step: torch.Tensor) -> Callable[[], Any] | Unavailable:
    """Return the operator below the public function's checks; it still resolves the backend, as `auto`."""
    try:
        operator = torch.ops.nlhf_kernels.row_uniforms.default
    except AttributeError as error:
        return Unavailable((f"{type(error).__name__}: {error}",))
    return partial(operator, seed, row_ids, step, STREAM, "")


def parts(inputs: Inputs) -> Mapping[str, Callable[[], Any] | Unavailable]:
    seed, row_ids, step = (tensor.contiguous() for tensor in inputs.args)
    return {"torch.ops": _operator(seed, row_ids, step), "bare _cpu": _bare_native(seed, row_ids, step)}


def bytes_moved(shape: Shape, mode: str) -> float:
    return 16.0 * int(shape.sizes["rows"])  # a row id read, a double written


def flops(shape: Shape, mode: str) -> float:
    return 0.0  # integer arithmetic: no matmul unit helps


CASE = Case(
    name="row_uniforms",
    op="row_uniforms",
    shapes={
        "tiny": [Shape({"rows": 1}, "float64", modes=("overhead",)), Shape({"rows": 33}, "float64")],
        "standard": [
            Shape({"rows": 1}, "float64", modes=("overhead",)),
            Shape({"rows": 256}, "float64", modes=("overhead", "forward")),
            Shape({"rows": 1 << 20}, "float64"),
        ],
    },
    make=make,
    truth=truth,
    baselines={"eager": Baseline(eager, check=unit_interval_check)},
    bytes_moved=bytes_moved,
    flops=flops,
    check=exact_check,
    parts=parts,
)
