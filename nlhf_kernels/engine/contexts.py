"""Context managers around forward passes: gradients and autocast off, other forwards, one thread at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch

_locks: WeakKeyDictionary[torch.nn.Module, Any] = WeakKeyDictionary()  # an RLock per model
_locks_lock = Lock()


@contextmanager
def no_autocast(device: torch.device) -> Iterator[None]:
    """Switch autocast, gradients and inference mode off.

    A rollout's caches outlive it: their dtype must not be autocast's, and tensors made under torch.inference_mode could
    be written to in that mode only.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def replaced_forwards(forwards: Sequence[tuple[torch.nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Replace modules' forwards, except those that another library has replaced already."""
    replaced = [(module, forward) for module, forward in forwards if "forward" not in vars(module)]
    for module, forward in replaced:
        vars(module)["forward"] = forward  # an assignment passes through Module.__setattr__, a microsecond each
    try:
        yield
    finally:
        for module, _ in replaced:
            del vars(module)["forward"]  # the class's own again


@contextmanager
def replaced_forward(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward, even one that another library has replaced, which is put back afterwards."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@contextmanager
def locked(*models: torch.nn.Module) -> Iterator[None]:
    """Lock these models against other threads while their forwards and attention are replaced."""
    with _locks_lock:
        locks = [_locks.setdefault(model, RLock()) for model in sorted(set(models), key=id)]
    with ExitStack() as stack:
        for lock in locks:
            stack.enter_context(lock)
        yield


@contextmanager
def exact_products() -> Iterator[None]:
    """Compute float32 products without TF32, whose rounding would hide small differences."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
