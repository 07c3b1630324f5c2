"""The correctness gate: an implementation is timed only if its result passes the check against the float64 truth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from .check import CheckContext, CheckResult, Tensors, tensors_of
from .implementations import Implementation
from .modes import Problem, truth_of
from .timing import Action

MAX_REASON = 300  # characters: a compiler's error can fill pages; its beginning names the cause


@dataclass(frozen=True)
class Verdict:
    """The gate's result for an implementation; `action` is set if it may be timed."""

    implementation: Implementation
    status: str
    reasons: tuple[str, ...] = ()
    checked: CheckResult | None = None
    action: Action | None = None


def short_reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:MAX_REASON]


def _judge(
    implementation: Implementation, problem: Problem, mode: str, truth: Tensors, context: CheckContext
) -> Verdict:
    if implementation.function is None:
        return Verdict(implementation, "unavailable", implementation.reasons)
    action = problem.action(implementation.function, mode)
    try:
        result = tensors_of(action.run(action.prepare()))
        checked = implementation.check(result, truth, context)
    except Exception as error:
        # torch.compile fails on a machine without a compiler, which is no fault. Any other implementation has reported
        # that it can run here, so its exception is a failure.
        status = "unavailable" if implementation.kind == "compiled" else "failed"
        return Verdict(implementation, status, (short_reason(error),))
    if not checked.ok:
        reason = f"error {checked.error:.3g}, allowed {checked.allowed:.3g}"
        return Verdict(implementation, "red", (reason,), checked)
    return Verdict(implementation, "ok", (), checked, action)


def judge_all(
    implementations: Mapping[str, Implementation], problem: Problem, mode: str, dtype: str
) -> dict[str, Verdict]:
    """Return every implementation's verdict. Eager runs first: its error determines the others' allowed error."""
    truth = truth_of(problem, mode)
    context = CheckContext(dtype, mode, None)
    verdicts = {}
    for name in sorted(implementations, key=lambda name: name != "eager"):
        verdicts[name] = _judge(implementations[name], problem, mode, truth, context)
        checked = verdicts[name].checked
        if name == "eager" and checked is not None and checked.ok and implementations[name].answers_the_same:
            context = replace(context, eager_error=checked.error if math.isfinite(checked.error) else None)
    return verdicts
