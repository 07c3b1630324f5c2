"""decode_attention: one new token a row over a preallocated key/value cache, without copies and without a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ...core import torch_op
from ...core.calls import Calls
from ...core.checks import (
    FLOATS,
    INTEGERS,
    Sizes,
    check_integer,
    check_is_tensor,
    check_not_empty,
    check_number,
    check_tensor,
)
from ...core.prepared import Result
from ...core.registry import Backend, Op, register

_HERE = "nlhf_kernels.ops.decode_attention"
_NO_WINDOW = 2**62  # positions: more than any cache has


class DecodeAttentionInputs(NamedTuple):
    query: torch.Tensor  # (R, Hq, D) float32, bfloat16 or float16
    keys: torch.Tensor  # (R, Hkv, L, D), its last dimension contiguous
    values: torch.Tensor  # (R, Hkv, L, Dv), likewise
    starts: torch.Tensor | None  # (R,) int64
    ends: torch.Tensor  # (R,) int64
    scale: float
    window: int
    softcap: float  # 0: none
    sinks: torch.Tensor | None  # (Hq,)
    backend: str


class DecodeAttentionProblem(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    dim: int
    value_dim: int


def _describe(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *_: object, **__: object
) -> DecodeAttentionProblem:
    return DecodeAttentionProblem(query.device, query.dtype, query.shape[2], values.shape[3])


def _triton_limits(problem: DecodeAttentionProblem) -> list[str]:
    if max(problem.dim, problem.value_dim) > 256:
        got = max(problem.dim, problem.value_dim)
        return [f"dim: a tile of whole keys and values is kept on the chip, at most 256 elements each; got {got}"]
    return []


OP = register(
    Op(
        name="decode_attention",
        backends=(
            Backend("torch", f"{_HERE}.oracle:decode_attention"),
            Backend(
                "triton", f"{_HERE}.triton_kernels:decode_attention", _triton_limits,
                preparation=f"{_HERE}.triton_kernels:prepare",
            ),
            Backend("cpu", f"{_HERE}.native:decode_attention_cpu", preparation=f"{_HERE}.native:prepare"),
        ),
        order={"cuda": ("triton", "torch"), "cpu": ("cpu", "torch")},
        describe=_describe,
        absent={
            "cuda": "reading the cache bounds it, Triton streams it: CUDA waits for a measurement of bandwidth left"
        },
    )
)  # fmt: skip


def _check(inputs: DecodeAttentionInputs) -> DecodeAttentionProblem:
    query, keys, values, starts, ends, _, window, _, sinks, _ = inputs
    op = OP.name
    sizes: Sizes = {}
    check_tensor(op, "query", query, ("rows", "heads", "dim"), FLOATS, sizes)
    device, same = query.device, (query.dtype,)
    check_tensor(op, "keys", keys, ("rows", "kv_heads", "positions", "dim"), same, sizes, device)
    check_tensor(op, "values", values, ("rows", "kv_heads", "positions", "value_dim"), same, sizes, device)
    check_not_empty(op, "keys", sizes, "kv_heads", "positions", "dim")
    if sizes["heads"] % sizes["kv_heads"] or not sizes["heads"]:
        raise ValueError(f"{op}: query: expected a multiple of {sizes['kv_heads']} heads; got {sizes['heads']}")
    if keys.stride(3) != 1 or values.stride(3) != 1:
        for name, cache in (("keys", keys), ("values", values)):
            if cache.stride(3) != 1 and cache.shape[3] > 1:
                raise ValueError(
                    f"{op}: {name}: expected a last dimension of stride 1, a cache is not copied; "
                    f"got strides {cache.stride()}"
                )
    check_tensor(op, "ends", ends, ("rows",), INTEGERS, sizes, device)
    if starts is not None:
        check_tensor(op, "starts", starts, ("rows",), INTEGERS, sizes, device)
    if sinks is not None:
        check_tensor(op, "sinks", sinks, ("heads",), FLOATS, sizes, device)
    check_integer(op, "window", window, 1, _NO_WINDOW)
    return DecodeAttentionProblem(device, query.dtype, query.shape[2], values.shape[3])


_calls = Calls(OP, DecodeAttentionInputs, _check)


def _run(inputs: DecodeAttentionInputs) -> torch.Tensor:
    query, keys, values, starts, ends, scale, window, softcap, sinks, backend = inputs
    if not (
        query.is_contiguous()
        and ends.is_contiguous()
        and (starts is None or starts.is_contiguous())
        and (sinks is None or sinks.is_contiguous())
    ):
        _check(inputs)
        query, ends = query.contiguous(), ends.contiguous()
        starts, sinks = (None if tensor is None else tensor.contiguous() for tensor in (starts, sinks))
        inputs = DecodeAttentionInputs(query, keys, values, starts, ends, scale, window, softcap, sinks, backend)
    result: torch.Tensor = _calls.run(inputs)
    return result


def attention_result(inputs: DecodeAttentionInputs, dtype: torch.dtype | None = None) -> Result:
    """Return shape and dtype of the result: (R, Hq, Dv), in the query's dtype unless `dtype` is given."""
    rows, heads, _ = inputs.query.shape
    return Result((rows, heads, inputs.values.shape[3]), dtype or inputs.query.dtype)


def _fake(inputs: DecodeAttentionInputs) -> torch.Tensor:
    _check(inputs)
    shape, dtype = attention_result(inputs)
    return torch.empty(shape, dtype=dtype, device=inputs.query.device)


_operator: Callable[[DecodeAttentionInputs], torch.Tensor] = torch_op.define(
    "decode_attention", DecodeAttentionInputs, "Tensor", _run, _fake, run_known=_calls.run_known
)


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    ends: torch.Tensor,
    starts: torch.Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:  # (R, Hq, Dv)
    """Return softmax(scale query . keys) values of every row, over the positions [starts, ends) of that row.

    Query head i reads key/value head i // (Hq / Hkv). Nothing outside a row's range is read, so a cache need not be
    initialised; a row whose range is empty gives zeros. A cache of L slots holds the last L positions: where ends
    exceeds L, slot 0 is position ends - L.

    starts and ends are read by the kernels only: a captured graph advances as they change. Not differentiable;
    gradients are not recorded.

    Args:
        query ((R, Hq, D) float32, bfloat16 or float16): of one new token a row.
        keys ((R, Hkv, L, D), dtype as query): the cache; any strides but for the last dimension; Hq a multiple of Hkv.
        values ((R, Hkv, L, Dv), dtype as query): likewise.
        ends ((R,) int64): the position of the row's new token, plus 1.
        starts ((R,) int64): the row's padding on the left; None is none.
        scale: of the scores; None is 1 / sqrt(D).
        window: only the last `window` positions before ends are read; None reads all.
        softcap: scores s become softcap tanh(s / softcap); None leaves them.
        sinks ((Hq,) float32, bfloat16 or float16): a score per head that takes part in the softmax and has no value.
        backend: see `use_backend`; None leaves the choice to it.
    """
    op = OP.name
    for name, value in (("query", query), ("keys", keys), ("values", values), ("ends", ends)):
        check_is_tensor(op, name, value)
    if starts is not None:
        check_is_tensor(op, "starts", starts)
    if sinks is not None:
        check_is_tensor(op, "sinks", sinks)
    scale = max(query.shape[-1:], default=1) ** -0.5 if scale is None else check_number(op, "scale", scale)
    window = _NO_WINDOW if window is None else check_integer(op, "window", window, 1, _NO_WINDOW)
    softcap = 0.0 if softcap is None else check_number(op, "softcap", softcap, 0.0, open_low=True)
    return _operator(
        DecodeAttentionInputs(
            _detached(query), _detached(keys), _detached(values), starts, ends, scale, window, softcap,
            None if sinks is None else _detached(sinks), backend or "",
        )
    )  # fmt: skip


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach() if tensor.requires_grad else tensor
