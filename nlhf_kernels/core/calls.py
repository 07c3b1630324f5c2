"""Calls of an operator by signature: arguments like those of an earlier call are neither checked nor resolved again.

A check looks at shapes, strides, dtypes and devices of tensors and at the other arguments' values (core/checks.py), and
nothing else. These make the signature of a call, so equal signatures pass the same checks. The same holds for the
choice of the backend, of its launch plan, and for whatever else a backend derives from them: `Backend.prepare`.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any, Generic, NamedTuple, TypeVar, get_type_hints

import torch

from . import settings, tuning
from .registry import Op, Problem

Inputs = TypeVar("Inputs", bound=NamedTuple)
_MAX_SIGNATURES = 4096  # per op; bounds memory where shapes keep changing
_TENSORS = frozenset((torch.Tensor, type(None)))
_VALUES = frozenset((bool, int, float, str, torch.dtype))


class Signature(Generic[Inputs]):
    """The function from an operator's inputs to what their checks depend on.

    Args:
        inputs (type): a NamedTuple of tensors, lists of tensors, numbers, texts and dtypes.
    """

    def __init__(self, inputs: type[Inputs]) -> None:
        lists: list[int] = []
        tensors: list[int] = []
        others: list[int] = []
        for index, kind in enumerate(get_type_hints(inputs).values()):
            tensor = kind in (torch.Tensor, torch.Tensor | None)
            (lists if kind == list[torch.Tensor] else tensors if tensor else others).append(index)
        self._lists = lists
        self._tensors, self._others = itemgetter(*tensors), itemgetter(*others)

    def tensors(self, inputs: Inputs) -> tuple[torch.Tensor | None, ...]:
        """Return the tensors and the absent ones of the inputs; a list's begin with None."""
        tensors: tuple[torch.Tensor | None, ...] = self._tensors(inputs)
        for index in self._lists:
            tensors += (None, *inputs[index])
        return tensors

    def __call__(self, inputs: Inputs) -> Any:
        """Return a hashable value; None for other types than the fields', subclasses of Tensor, which may report
        anything, and tensors that are not dense.

        Types belong to it, as 1, 1.0 and True are equal.
        """
        tensors = self.tensors(inputs)
        if not _TENSORS.issuperset(map(type, tensors)):
            return None
        others = self._others(inputs)
        kinds = tuple(map(type, others))
        if not _VALUES.issuperset(kinds):
            return None
        try:
            facts = [None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors]
        except RuntimeError:  # no strides
            return None
        return (*facts, others, kinds)


class Calls(Generic[Inputs]):
    """The implementation of an operator.

    Args:
        op (Op): the room's entry, which chooses the backend.
        inputs (type): the operator's NamedTuple, with a field `backend`; at least two fields are tensors.
        check (callable): inputs -> the problem; raises where an argument is wrong.
    """

    def __init__(self, op: Op, inputs: type[Inputs], check: Callable[[Inputs], Problem]) -> None:
        self._op, self._check, self._signature = op, check, Signature(inputs)
        self._known: dict[Any, Callable[[Inputs], Any]] = {}

    def run(self, inputs: Inputs) -> Any:
        """Check `inputs` unless a call of this signature was checked before, and run the backend."""
        key = self._key(inputs)
        run = self._known.get(key)
        return (self._prepared(inputs, key) if run is None else run)(inputs)

    def known(self, inputs: Inputs) -> Callable[[Inputs], Any] | None:
        """Return what runs a call of this signature without PyTorch's dispatcher; None where there was no such call
        yet, or the dispatcher has work to do: a gradient, or a sign that is not yet applied to the memory."""
        run = self._known.get(self._key(inputs))
        if run is not None:
            graph = torch.is_grad_enabled()
            for x in self._signature.tensors(inputs):
                if x is not None and ((graph and x.requires_grad) or x.is_neg()):
                    return None
        return run

    def _key(self, inputs: Inputs) -> Any:
        """Return all that the checks, the backend and its plan depend on; None where that is not known."""
        if tuning.is_overridden():
            return None
        signature = self._signature(inputs)
        return None if signature is None else (signature, settings.requested(None).backend, tuning.generation())

    def _prepared(self, inputs: Inputs, key: Any) -> Callable[[Inputs], Any]:
        backend = self._op.resolve(inputs.backend, self._check(inputs))  # type: ignore[attr-defined]
        run = backend.prepare(inputs) if backend.preparation else lambda inputs: backend.run(inputs)
        if key is not None:
            if len(self._known) >= _MAX_SIGNATURES:
                self._known.clear()
            self._known[key] = run
        return run
