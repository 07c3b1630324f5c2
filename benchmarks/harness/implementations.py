"""The implementations of a call: baselines, torch.compile, the library's backends and the layers below them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .case import Baseline, Case, Function, Inputs, Unavailable
from .check import Check
from .library import backend_call, backend_report

PART_MODES = ("forward", "overhead")  # a part is bound to its inputs, so it has no gradients
COMPILED = "torch.compile"


@dataclass(frozen=True)
class Implementation:
    """One row of the comparison; `function` is None if it cannot run, for the reasons in `reasons`."""

    name: str
    kind: str  # baseline, compiled, backend, variant, part
    check: Check
    function: Function | None = None
    reasons: tuple[str, ...] = ()
    chosen: bool = False  # `auto` would take it
    answers_the_same: bool = True  # False: it has its own check, and its error is no reference for the others
    bound: Callable[[], Any] | None = None  # a part: the bare call

    def call(self, inputs: Inputs) -> Callable[[], Any]:
        """Return the call without a wrapping Python frame, for measuring the cost of a call."""
        if self.bound is not None:
            return self.bound
        if self.function is None:
            raise ValueError(f"{self.name} cannot run: {self.reasons}")
        return partial(self.function, *inputs.args, **inputs.kwargs)


def _baseline(name: str, rival: Baseline, case: Case, inputs: Inputs) -> Implementation:
    reasons = rival.why_not(inputs)
    function = None if reasons else rival.function
    return Implementation(
        name, "baseline", rival.check or case.check, function, reasons, answers_the_same=rival.check is None
    )


def _compiled(case: Case, check: Check) -> Implementation:
    torch.compiler.reset()  # otherwise the second shape would be compiled for dynamic sizes
    if case.compiled is None:
        raise ValueError(f"case {case.name} has nothing to compile")
    try:
        function = case.compiled()
    except Exception as error:
        return Implementation(COMPILED, "compiled", check, None, (f"{type(error).__name__}: {error}",))
    return Implementation(COMPILED, "compiled", check, function)


def _backends(case: Case, inputs: Inputs, mode: str, backends: Sequence[str]) -> list[Implementation]:
    report = backend_report(case.op, inputs.args, inputs.kwargs)
    implementations = []
    for name, reasons in report.reasons.items():
        if not backends or name in backends:
            function = None if reasons else backend_call(case.function or case.op, name)
            is_auto = name == report.chosen
            implementations.append(Implementation(name, "backend", case.check, function, tuple(reasons), is_auto))
            for label, variant in case.variants.items():
                if function is not None and mode in variant.modes:
                    implementations.append(
                        Implementation(f"{name}, {label}", "variant", case.check, variant.call(function))
                    )
    return implementations


def _parts(case: Case, inputs: Inputs) -> list[Implementation]:
    implementations = []
    for name, part in case.parts(inputs).items():
        if isinstance(part, Unavailable):
            implementations.append(Implementation(name, "part", case.check, None, part.reasons))
        else:
            function = partial(_ignore_arguments, part)
            implementations.append(Implementation(name, "part", case.check, function, bound=part))
    return implementations


def _ignore_arguments(part: Callable[[], Any], *_: Any, **__: Any) -> Any:
    return part()


def collect(
    case: Case, inputs: Inputs, mode: str, backends: Sequence[str], with_compile: bool
) -> dict[str, Implementation]:
    """Return every implementation by name, including those that cannot run, with their reasons."""
    implementations = [_baseline(name, rival, case, inputs) for name, rival in case.baselines.items()]
    if case.compiled is not None and with_compile:
        eager = case.baselines.get("eager")  # the compiled rival gets eager's check
        implementations.append(_compiled(case, (eager and eager.check) or case.check))
    implementations += _backends(case, inputs, mode, backends)
    if mode in PART_MODES:
        implementations += _parts(case, inputs)
    names = [implementation.name for implementation in implementations]
    if len(set(names)) != len(names):
        raise ValueError(f"case {case.name}: expected one implementation a name, got {names}")
    return {implementation.name: implementation for implementation in implementations}
