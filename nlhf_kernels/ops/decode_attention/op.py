"""decode_attention: one new token a row over a preallocated key/value cache, without copies and without a mask."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...core import torch_op
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
from ...core.registry import Backend, Op, register

_HERE = "nlhf_kernels.ops.decode_attention"
_NO_WINDOW = 2**62  # positions: more than any cache has


class DecodeAttentionProblem(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    dim: int
    value_dim: int


def _describe(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> Any:
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
            Backend("triton", f"{_HERE}.triton_kernels:decode_attention", _triton_limits),
            Backend("cpu", f"{_HERE}.native:decode_attention_cpu"),
        ),
        order={"cuda": ("triton", "torch"), "cpu": ("cpu", "torch")},
        describe=_describe,
        absent={
            "cuda": "reading the cache bounds it, Triton streams it: CUDA waits for a measurement of bandwidth left"
        },
    )
)


def _check(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor | None,
    ends: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> None:
    op = OP.name
    sizes: Sizes = {}
    check_tensor(op, "query", query, ("rows", "heads", "dim"), FLOATS, sizes)
    device, same = query.device, (query.dtype,)
    check_tensor(op, "keys", keys, ("rows", "kv_heads", "positions", "dim"), same, sizes, device)
    check_tensor(op, "values", values, ("rows", "kv_heads", "positions", "value_dim"), same, sizes, device)
    check_not_empty(op, "keys", sizes, "kv_heads", "positions", "dim")
    if sizes["heads"] % sizes["kv_heads"] or not sizes["heads"]:
        raise ValueError(f"{op}: query: expected a multiple of {sizes['kv_heads']} heads; got {sizes['heads']}")
    for name, cache in (("keys", keys), ("values", values)):
        strides = cache.stride()
        if strides[3] != 1 and cache.shape[3] > 1:
            raise ValueError(
                f"{op}: {name}: expected a last dimension of stride 1, a cache is not copied; got strides {strides}"
            )
    check_tensor(op, "ends", ends, ("rows",), INTEGERS, sizes, device)
    if starts is not None:
        check_tensor(op, "starts", starts, ("rows",), INTEGERS, sizes, device)
    if sinks is not None:
        check_tensor(op, "sinks", sinks, ("heads",), FLOATS, sizes, device)
    check_integer(op, "window", window, 1, _NO_WINDOW)


def _run(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor | None,
    ends: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    _check(query, keys, values, starts, ends, scale, window, softcap, sinks)
    result: torch.Tensor = OP.resolve(backend, _describe(query, keys, values)).run(
        query.contiguous(),
        keys,
        values,
        None if starts is None else starts.contiguous(),
        ends.contiguous(),
        scale,
        window,
        softcap,
        None if sinks is None else sinks.contiguous(),
    )
    return result


def _fake(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *rest: Any) -> torch.Tensor:
    *call, _ = rest
    _check(query, keys, values, *call)
    return query.new_empty((query.shape[0], query.shape[1], values.shape[3]))


_operator = torch_op.define(
    "decode_attention",
    "(Tensor query, Tensor keys, Tensor values, Tensor? starts, Tensor ends, float scale, int window, float softcap,"
    " Tensor? sinks, str backend) -> Tensor",
    _run,
    _fake,
)


def decode_attention(
    query: torch.Tensor,  # (R, Hq, D) float32, bfloat16 or float16
    keys: torch.Tensor,  # (R, Hkv, L, D), any strides but for the last dimension; Hq a multiple of Hkv
    values: torch.Tensor,  # (R, Hkv, L, Dv), likewise
    *,
    ends: torch.Tensor,  # (R,) int64: the position of the row's new token, plus 1
    starts: torch.Tensor | None = None,  # (R,) int64: how much padding stands on the left; None: none
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # (Hq,) float32, bfloat16 or float16
    backend: str | None = None,
) -> torch.Tensor:  # (R, Hq, Dv)
    """softmax(scale query . keys) values of every row, over the positions [starts, ends) of that row.

    Query head i reads key/value head i // (Hq / Hkv). Nothing outside a row's range is looked at, so a cache need not
    be initialised; a row whose range is empty gives zeros. A cache of L slots holds the last L positions: where ends
    exceeds L, slot 0 is position ends - L.

    scale: 1 / sqrt(D) where not given. window: only the last `window` positions before ends. softcap: scores s become
    softcap tanh(s / softcap). sinks: a score per head that takes part in the softmax and has no value.

    starts and ends are read by the kernels only: a captured graph advances as they change. Not differentiable;
    gradients are not recorded.
    """
    op = OP.name
    tensors = {"query": query, "keys": keys, "values": values, "ends": ends, "starts": starts, "sinks": sinks}
    for name, value in tensors.items():
        if value is not None or name not in ("starts", "sinks"):
            check_is_tensor(op, name, value)
    scale = max(query.shape[-1:], default=1) ** -0.5 if scale is None else check_number(op, "scale", scale)
    window = _NO_WINDOW if window is None else check_integer(op, "window", window, 1, _NO_WINDOW)
    softcap = 0.0 if softcap is None else check_number(op, "softcap", softcap, 0.0, open_low=True)
    result: torch.Tensor = _operator(
        _plain(query), _plain(keys), _plain(values), starts, ends, scale, window, softcap,
        None if sinks is None else _plain(sinks), backend or "",
    )  # fmt: skip
    return result


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach() if tensor.requires_grad else tensor
