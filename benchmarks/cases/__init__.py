"""The registry of cases: every module in this folder defines one as `CASE`."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from ..harness.case import Case


@cache
def all_cases() -> dict[str, Case]:
    """Return name -> case. A case has the name of its module, which is the name of the op's room."""
    cases = {}
    for module in pkgutil.iter_modules(__path__):
        case = importlib.import_module(f"{__name__}.{module.name}").CASE
        if case.name != module.name:
            raise ValueError(f"benchmarks/cases/{module.name}.py: expected the case {module.name}, got {case.name}")
        cases[case.name] = case
    return cases
