"""Choose the backend of an op: each backend gives reasons why it cannot run a call, `auto` takes the first that can.

A room registers one `Op`: its backends, their limits, the order in which `auto` tries them. A call is described by the
room's `Problem`, a NamedTuple of what the choice depends on (device, dtypes, sizes); choices are cached per problem.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch

from . import capabilities, settings
from .checks import check_option

log = logging.getLogger("nlhf_kernels")

_MAX_DECISIONS = 4096  # per op; bounds the cache where shapes keep changing


class Problem(Protocol):
    """The properties of a call that decide which backend can run it: a NamedTuple per room, with a device."""

    @property
    def device(self) -> torch.device: ...


class BackendUnavailable(RuntimeError):
    """The chosen backend cannot run this call; the message gives every backend's reasons."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op: its import path and its limits."""

    name: str
    path: str  # "module:function", imported at first use: importing the package needs neither triton nor a compiler
    limits: Callable[[Any], list[str]] = lambda problem: []
    backward: str = ""  # "module:function" of the gradient, where the op has one
    preparation: str = ""  # "module:function": inputs -> how all calls of their signature run (core/calls.py)

    def why_not(self, problem: Problem) -> list[str]:
        """Return the reasons why this backend cannot run `problem`; empty where it can."""
        return capabilities.machine_reasons(self.name, problem.device) + self.limits(problem)

    @cached_property
    def run(self) -> Callable[..., Any]:
        return _imported(self.path)

    @cached_property
    def prepare(self) -> Callable[..., Any]:
        return _imported(self.preparation)

    @cached_property
    def run_backward(self) -> Callable[..., Any]:
        return _imported(self.backward)


def _imported(path: str) -> Callable[..., Any]:
    module, _, function = path.partition(":")
    implementation: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return implementation


@dataclass(frozen=True)
class Measured:
    """The order of backends, by their measured speed, for some of an op's problems."""

    device: str  # type
    problems: str  # which, in words
    applies: Callable[[Any], bool]
    order: tuple[str, ...]  # the fastest first
    source: str


@dataclass(frozen=True)
class Explanation:
    """Which backend a call would run on, and why; `print` it.

    Args:
        op: the op's name.
        problem: the properties of the call that decide.
        reasons: backend -> reasons why not; an empty list where it can run.
        chosen: the backend that would run; None where the requested one cannot.
        request: the requested backend, and where the request comes from.
        order: in which auto tries backends, and why.
    """

    op: str
    problem: Problem
    reasons: dict[str, list[str]]
    chosen: str | None
    request: settings.Request
    order: str = ""

    def __str__(self) -> str:
        lines = [f"{self.op} with {self.problem}", f"requested: {self.request.backend} ({self.request.origin})"]
        if self.order and self.request.backend == "auto":
            lines.append(f"order of auto: {self.order}")
        for backend, reasons in self.reasons.items():
            mark = "->" if backend == self.chosen else "  "
            lines.append(f"{mark} {backend:<10} {'; '.join(reasons) or 'can run'}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Op:
    """A room's entry: its backends and the order in which `auto` tries them on each kind of device."""

    name: str
    backends: tuple[Backend, ...]
    order: dict[str, tuple[str, ...]]  # device type -> backends, the fastest first; `measured` takes precedence
    describe: Callable[..., Problem]  # the public function's arguments -> the problem
    absent: dict[str, str] = field(default_factory=dict)  # backend -> why this room has none
    measured: tuple[Measured, ...] = ()  # the first that applies is used
    built_on: str = ""  # the room whose kernels this one calls; "": its own
    _decisions: dict[Any, Backend] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        named = {backend.name for backend in self.backends} | set(self.absent)
        if named != set(settings.BACKENDS):
            raise ValueError(f"op {self.name}: expected a backend or a reason for each of {settings.BACKENDS}")
        for names in [*self.order.values(), *(measured.order for measured in self.measured)]:
            if names[-1] != "torch":
                raise ValueError(f"op {self.name}: the order for auto must end with torch, got {names}")

    def why_not(self, name: str, problem: Problem) -> list[str]:
        if name in self.absent:
            return [self.absent[name]]
        return self.backend(name).why_not(problem)

    def backend(self, name: str) -> Backend:
        return next(backend for backend in self.backends if backend.name == name)

    def reasons(self, problem: Problem) -> dict[str, list[str]]:
        return {name: self.why_not(name, problem) for name in settings.BACKENDS}

    def resolve(self, argument: str | None, problem: Problem) -> Backend:
        """Return the backend that runs `problem`. An explicit choice that cannot run raises; it never falls back."""
        key = (argument or settings.requested(None).backend, problem)
        chosen = self._decisions.get(key)
        if chosen is None:
            chosen = self._decide(settings.requested(argument), problem)
            if len(self._decisions) >= _MAX_DECISIONS:
                self._decisions.clear()
            self._decisions[key] = chosen
        return chosen

    def order_of(self, problem: Problem) -> tuple[tuple[str, ...], str]:
        """Return the order in which auto tries backends for `problem`, and the same in words."""
        device = problem.device.type
        for measured in self.measured:
            if measured.device == device and measured.applies(problem):
                return measured.order, f"{' > '.join(measured.order)} ({measured.problems}: {measured.source})"
        order = self.order.get(device, ("torch",))
        return order, " > ".join(order)

    def _decide(self, request: settings.Request, problem: Problem) -> Backend:
        check_option(self.name, "backend", request.backend, settings.CHOICES)
        if request.backend == "auto":
            order, _ = self.order_of(problem)
            chosen = next(self.backend(name) for name in order if not self.why_not(name, problem))
            log.info("%s: auto chose %s for %s", self.name, chosen.name, problem)
            return chosen
        if not self.why_not(request.backend, problem):
            return self.backend(request.backend)
        explanation = Explanation(self.name, problem, self.reasons(problem), None, request)
        raise BackendUnavailable(f"backend {request.backend!r} cannot run this call.\n{explanation}")


_ops: dict[str, Op] = {}


def register(op: Op) -> Op:
    if op.name in _ops:
        raise ValueError(f"op {op.name} is registered twice")
    _ops[op.name] = op
    return op


def built_on(op: Op, name: str, describe: Callable[..., Problem]) -> Op:
    """Register a room that calls the kernels of `op`: it runs on the same backends, for the same reasons."""
    return register(replace(op, name=name, describe=describe, built_on=op.name, _decisions={}))


def ops() -> tuple[Op, ...]:
    return tuple(_ops.values())


def get_op(name: str) -> Op:
    if name not in _ops:
        raise ValueError(f"op: expected one of {', '.join(sorted(_ops))}; got {name!r}")
    return _ops[name]


def explain(op: str, *args: Any, backend: str | None = None, **kwargs: Any) -> Explanation:
    """Say which backend `op(*args, **kwargs)` would run on and why the others would not, without running it.

    Args:
        op: the op's name, as in `nlhf_kernels.<op>`.
        args, kwargs: the call's arguments.
        backend: as in the call.
    """
    if backend is not None:
        check_option("explain", "backend", backend, settings.CHOICES)
    entry = get_op(op)
    problem = entry.describe(*args, **kwargs)
    request = settings.requested(backend)
    try:
        chosen: str | None = entry.resolve(backend, problem).name
    except BackendUnavailable:
        chosen = None
    return Explanation(op, problem, entry.reasons(problem), chosen, request, entry.order_of(problem)[1])
