"""Calls of an operator by signature: arguments like those of an earlier call are neither checked nor resolved again.

A check looks at shapes, strides, dtypes and devices of tensors and at the other arguments' values (core/checks.py), and
nothing else. These, and which addresses are aligned, make the signature of a call, so equal signatures pass the same
checks. The same holds for the choice of the backend, of its launch plan, and for whatever else a backend derives from
them: `Backend.prepare`.

The table of known calls is `_cpu.KnownCalls` (csrc/common/known_calls.cpp) where PyTorch lets C++ read tensors, and
`KnownCalls` below, which does the same, elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from . import capabilities, settings, tuning, upstream
from .prepared import ALIGNMENT, PreparedCall, Slot, Source, tensors_of
from .registry import Op, Problem

log = logging.getLogger("nlhf_kernels")

Inputs = TypeVar("Inputs", bound=NamedTuple)
MAX_SIGNATURES = 4096  # of a table; bounds memory where shapes keep changing
TENSORS = (torch.Tensor, torch.nn.Parameter)  # not their subclasses, which may report anything
_VALUES = frozenset((type(None), bool, int, float, str, torch.dtype))


def signature(values: Iterable[Any]) -> tuple[Any, ...] | None:
    """Return what checks of these arguments depend on; None where they hold other types, or tensors that are not dense.

    Types belong to it, as 1, 1.0 and True are equal.
    """
    facts: list[Any] = []
    for value in values:
        kind = type(value)
        if kind in _VALUES:
            facts.append((kind, value))
        elif kind in TENSORS:
            try:
                aligned = value.data_ptr() % ALIGNMENT == 0
                facts.append((value.shape, value.stride(), value.dtype, value.device, aligned))
            except RuntimeError:  # no strides, or no memory
                return None
        elif kind is list and all(type(part) in TENSORS for part in value):
            facts.append(signature(value))
        else:
            return None
    return None if None in facts else tuple(facts)


class KnownCalls:
    """How calls of known signatures run. `_cpu.KnownCalls` has the same methods."""

    def __init__(self) -> None:
        self._known: dict[Any, Callable[[Any], Any]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def run(self, inputs: tuple[Any, ...], context: tuple[Any, ...], gradients: bool | None) -> Any:
        """Return the result of a call of a known signature, NotImplemented for others.

        Args:
            inputs: the arguments.
            context: of the call, numbers and texts: part of its signature.
            gradients: None inside an operator. Else whether gradients are recorded; then a call for which PyTorch's
                dispatcher has work to do is unknown: a gradient, or a sign that is not yet applied to the memory.
        """
        run = self._known.get(signature((*inputs, *context)))
        if run is None:
            return NotImplemented
        if gradients is not None:
            for tensor in tensors_of(inputs):
                if (gradients and tensor.requires_grad) or tensor.is_neg():
                    return NotImplemented
        return run(inputs)

    def learn(
        self, inputs: tuple[Any, ...], context: tuple[Any, ...], run: Callable[[Any], Any], prepared: Any
    ) -> None:
        """Keep how calls of this signature run.

        Args:
            inputs, context: as in `run`.
            run: inputs -> the result.
            prepared: the same as a PreparedCall, for C++; None: there is none.
        """
        key = signature((*inputs, *context))
        if key is not None:
            if len(self._known) >= MAX_SIGNATURES:
                self._known.clear()
            self._known[key] = run


def known_calls() -> Any:
    """Return an empty table, in C++ where PyTorch and `_cpu` allow it."""
    return KnownCalls() if native_calls_missing() else _native_calls()


def _native_calls() -> Any:
    arguments = (upstream.tensor_exchange(), TENSORS, torch.dtype, Slot, MAX_SIGNATURES)
    return capabilities.native("_cpu").KnownCalls(*arguments)


@cache
def native_calls_missing() -> str:
    """Return why the table is not in C++; empty where it is."""
    if upstream.tensor_exchange() is None:
        return f"torch {torch.__version__} gives C no access to tensors; 2.10 does"
    if reason := capabilities.native_missing("_cpu"):
        return reason
    try:
        return "" if _reads_right(_native_calls()) else "torch describes a tensor to C otherwise than to Python"
    except Exception as error:
        log.warning("calls of known signatures run in Python: %s: %s", type(error).__name__, error)
        return f"{type(error).__name__}: {error}"


def _reads_right(calls: Any) -> bool:
    """Return whether a table in C++ reads addresses, and tells tensors apart, as Python does."""
    device = torch.device("cpu")
    matrix = torch.zeros((4, 8), dtype=torch.float32, device=device)
    views = [matrix[1:, :3], matrix[:3, :3], matrix[1:, :4], matrix[1:, 1:4], matrix[1:, :6:2], matrix[1:, :3].int()]
    addresses: list[int] = []
    prepared = PreparedCall(device, (), ((addresses.append, (Slot(Source.INPUT, 0),)),))
    calls.learn((views[0],), (), prepared, prepared)
    known = [view for view in views if calls.run((view,), (), None) is not NotImplemented]
    alike = [view for view in views if signature((view,)) == signature((views[0],))]
    return addresses == [view.data_ptr() for view in known] == [view.data_ptr() for view in alike]


class Calls(Generic[Inputs]):
    """The implementation of an operator.

    Args:
        op (Op): the room's entry, which chooses the backend.
        inputs (type): the operator's NamedTuple, with a field `backend`.
        check (callable): inputs -> the problem; raises where an argument is wrong.
    """

    def __init__(self, op: Op, inputs: type[Inputs], check: Callable[[Inputs], Problem]) -> None:
        self._op, self._check = op, check
        self._known: Any = None  # made by the first call: importing the package imports no native module

    def run(self, inputs: Inputs) -> Any:
        """Check `inputs` unless a call of this signature was checked before, and run the backend."""
        context = _context()
        if context is None:
            return self._prepared(inputs)(inputs)
        if self._known is None:
            self._known = known_calls()
        result = self._known.run(inputs, context, None)
        if result is NotImplemented:
            run = self._prepared(inputs)
            result = run(inputs)
            complete = isinstance(run, PreparedCall) and run.is_complete
            self._known.learn(inputs, context, run, run if complete else None)
        return result

    def run_known(self, inputs: Inputs) -> Any:
        """Run a call of a known signature without PyTorch's dispatcher; NotImplemented where there was no such call
        yet, or the dispatcher has work to do: a gradient, or a sign that is not yet applied to the memory."""
        context = _context()
        if context is None or self._known is None:
            return NotImplemented
        return self._known.run(inputs, context, torch.is_grad_enabled())

    def _prepared(self, inputs: Inputs) -> Callable[[Inputs], Any]:
        backend = self._op.resolve(inputs.backend, self._check(inputs))  # type: ignore[attr-defined]
        if backend.preparation:
            prepared: Callable[[Inputs], Any] = backend.prepare(inputs)
            return prepared
        return lambda inputs: backend.run(inputs)


def _context() -> tuple[str, int] | None:
    """Return what calls depend on beside their arguments; None where each launch must ask for its plan."""
    return None if tuning.is_overridden() else (settings.requested(None).backend, tuning.generation())
