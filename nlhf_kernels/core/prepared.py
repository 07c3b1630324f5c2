"""What a call of a known signature does: allocate its results, and call functions with addresses.

A backend that can say so beforehand prepares a `PreparedCall`, which `_cpu.KnownCalls` (csrc/common/known_calls.cpp)
then makes without Python code. Where that class is missing, the call makes itself, by the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from itertools import count
from math import prod
from typing import Any, NamedTuple

import torch

from . import upstream
from .native import on_device

ALIGNMENT = 16  # bytes; kernels are compiled for addresses that are multiples of it, or for others


class Source(IntEnum):
    """Where an argument of a step comes from; the numbers are those of known_calls.cpp."""

    INPUT = 0  # the address of a tensor among the call's inputs
    RESULT = 1  # the address of a result
    SCRATCH = 2  # an address in the call's working memory
    NOW = 3  # what a function returned at the call's beginning


class Slot(NamedTuple):
    """An argument of a step that differs from call to call.

    Args:
        source (Source): where it comes from.
        place (int): the index of the tensor, the result or the function; in the working memory, bytes from its start.
    """

    source: int
    place: int


class Result(NamedTuple):
    """A tensor that a call allocates."""

    shape: tuple[int, ...]
    dtype: torch.dtype


Step = tuple[Callable[..., Any], tuple[Any, ...]]  # a function; its arguments: constants, Slots and tuples of both


def tensors_of(inputs: Iterable[Any]) -> list[torch.Tensor]:
    """Return the tensors of a call's inputs in their order, those of lists in their places."""
    tensors: list[torch.Tensor] = []
    for value in inputs:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, list):
            tensors += value
    return tensors


def slots_of(inputs: Any) -> Any:
    """Return the NamedTuple `inputs` with a Slot in the place of every tensor."""
    number = count()
    return _with_replaced_tensors(inputs, lambda tensor: Slot(Source.INPUT, next(number)))


def addresses_of(inputs: Any) -> Any:
    """Return the NamedTuple `inputs` with the address in the place of every tensor."""
    return _with_replaced_tensors(inputs, torch.Tensor.data_ptr)


def _with_replaced_tensors(inputs: Any, replacement: Callable[[torch.Tensor], Any]) -> Any:
    def replaced(value: Any) -> Any:
        return replacement(value) if isinstance(value, torch.Tensor) else value

    return type(inputs)(*[[*map(replaced, x)] if isinstance(x, list) else replaced(x) for x in inputs])


class PreparedCall:
    """A call of one signature.

    Args:
        device (torch.device): of all tensors.
        results (of Result): what the call returns: nothing, a tensor, or a tuple of several.
        steps (of Step): what it does.
        scratch (int): bytes of its working memory.
        now (of () -> value): evaluated once a call, for Slots of NOW.
        ready (() -> bool): whether a call may leave Python out now; None: always.
    """

    def __init__(
        self, device: torch.device, results: Sequence[Result], steps: Sequence[Step], scratch: int = 0,
        now: Sequence[Callable[[], Any]] = (), ready: Callable[[], bool] | None = None,
    ) -> None:  # fmt: skip
        self.device, self.steps, self.now, self.ready = device, tuple(steps), tuple(now), ready
        self.results, self.scratch = len(results), scratch
        pieces = [*results, Result((scratch,), torch.uint8)] if scratch else results
        self.allocate = upstream.allocator(device)
        self.allocations = [(shape, _strides(shape), dtype) for shape, dtype in pieces]

    @property
    def is_complete(self) -> bool:
        """Whether `steps` are all that a call does."""
        return True

    def __call__(self, inputs: Iterable[Any]) -> Any:
        with on_device(self.device):
            allocated = [self.allocate(*arguments) for arguments in self.allocations]
            self._run(tensors_of(inputs), allocated)
        results = allocated[: self.results]
        return None if not results else results[0] if len(results) == 1 else tuple(results)

    def _run(self, inputs: list[torch.Tensor], allocated: list[torch.Tensor]) -> None:
        addresses = [tensor.data_ptr() for tensor in allocated]
        scratch = addresses[self.results] if self.scratch else 0
        sources = ([tensor.data_ptr() for tensor in inputs], addresses, scratch, [function() for function in self.now])
        for function, arguments in self.steps:
            function(*_evaluate(arguments, sources))


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _evaluate(arguments: tuple[Any, ...], sources: tuple[Any, ...]) -> list[Any]:
    values = []
    for argument in arguments:
        if type(argument) is Slot:
            source, place = argument
            argument = sources[source] + place if source == Source.SCRATCH else sources[source][place]
        elif type(argument) is tuple:
            argument = tuple(_evaluate(argument, sources))
        values.append(argument)
    return values
