"""Raise, on a machine without a GPU, for operations that cannot be captured in a CUDA graph.

Tensors are on PyTorch's meta device, which holds no values: code takes the branches of a device other than the CPU, and
reading a value fails. In addition, `capturing` raises for data copied from the host and for a mask used as an index,
whose result has a data-dependent size. The same rules apply inside this library's operators, which run their backend's
Python code; launches of Triton kernels are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from nlhf_kernels.core import capabilities, torch_op

DEVICE = torch.device("meta")
_MADE_OF_HOST_DATA = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.frombuffer)
_INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
_COPIES = (torch.ops.aten._to_copy, torch.ops.aten.copy_)
_INDEXED = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten.masked_select)


class CaptureRefused(AssertionError):
    """An operation that would fail in a CUDA graph's capture."""


class _FunctionRules(TorchFunctionMode):
    """Rules for calls from Python: host data that PyTorch's C++ copies to the device before any operator runs."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _MADE_OF_HOST_DATA and not isinstance(args[0], torch.Tensor):
            raise CaptureRefused(f"torch.{function.__name__}({args[0]!r}) copies from the host; torch.full does not")
        if function in _INDEXING:
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, (list, range)) for part in parts):
                raise CaptureRefused(f"the index {args[1]!r} is a list, which is copied from the host")
        return function(*args, **(kwargs or {}))


class _OperatorRules(TorchDispatchMode):
    """Rules for PyTorch's operators."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # dispatched again as the operators and collectives it consists of
        if any(issubclass(kind, FakeTensor) for kind in types):
            return function(*args, **kwargs)  # DTensor looks for layouts, on the host
        if implementation := torch_op.IMPLEMENTATIONS.get(function):
            with self:
                return implementation(*args, **kwargs)
        packet = function.overloadpacket
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_host = [tensor for tensor in tensors if tensor.device.type == "cpu"]
        if any(tensor.ndim for tensor in on_host) or (packet in _COPIES and on_host):
            raise CaptureRefused(f"{function} takes a tensor that lies on the CPU")
        if packet in _COPIES and kwargs.get("device", DEVICE).type == "cpu":
            raise CaptureRefused(f"{function} copies to the CPU")
        if packet in _INDEXED and any(part is not None and part.dtype == torch.bool for part in tree_leaves(args[1])):
            raise CaptureRefused(f"{function} with a mask: how many elements it keeps only the device knows")
        return function(*args, **kwargs)


def on_device(values: Any) -> Any:
    """Return `values` with its tensors moved to the meta device."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(DEVICE).requires_grad_(tensor.requires_grad)

    return tree_map_only(torch.Tensor, moved, values)


@contextmanager
def no_launches() -> Iterator[None]:
    """Skip launches of Triton kernels, since meta tensors have no memory."""
    if capabilities.triton_missing():
        yield
        return
    with mock.patch("triton.runtime.jit.KernelInterface.__getitem__", return_value=lambda *_, **__: None):
        yield


@contextmanager
def said_to_capture() -> Iterator[None]:
    """Let PyTorch say that the current stream is being captured: transformers then reads no mask on the host."""
    with mock.patch("torch.cuda.is_current_stream_capturing", return_value=True):
        yield


@contextmanager
def capturing() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(said_to_capture())
        # Autocast, off in all of these tests, does not support the meta device.
        stack.enter_context(mock.patch("torch.autocast", return_value=nullcontext()))
        stack.enter_context(mock.patch("torch.is_autocast_enabled", return_value=False))
        stack.enter_context(no_launches())
        stack.enter_context(_FunctionRules())
        stack.enter_context(_OperatorRules())
        yield
