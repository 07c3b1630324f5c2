"""The correctness gate: nothing is timed before its result was held against the float64 truth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from .check import CheckContext, CheckResult, Tensors, tensors_of
from .implementations import Implementation
from .modes import Problem, truth_of
from .timing import Action

MAX_REASON = 300  # a compiler's complaint can fill pages; its beginning names the cause


@dataclass(frozen=True)
class Verdict:
    """What the gate found; `action` is there for what may be timed."""

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
        # A machine without a compiler cannot run torch.compile: a fact about the machine. Anything else that said it
        # could run and did not is a fault.
        status = "unavailable" if implementation.kind == "compiled" else "failed"
        return Verdict(implementation, status, (short_reason(error),))
    if not checked.ok:
        reason = f"error {checked.error:.3g}, allowed {checked.allowed:.3g}"
        return Verdict(implementation, "red", (reason,), checked)
    return Verdict(implementation, "ok", (), checked, action)


def judge_all(
    implementations: Mapping[str, Implementation], problem: Problem, mode: str, dtype: str
) -> dict[str, Verdict]:
    """Every implementation's verdict. Eager comes first: its own error sets what the others may err."""
    truth = truth_of(problem, mode)
    context = CheckContext(dtype, mode, None)
    verdicts = {}
    for name in sorted(implementations, key=lambda name: name != "eager"):
        verdicts[name] = _judge(implementations[name], problem, mode, truth, context)
        checked = verdicts[name].checked
        if name == "eager" and checked is not None and checked.ok and implementations[name].answers_the_same:
            context = replace(context, eager_error=checked.error if math.isfinite(checked.error) else None)
    return verdicts
