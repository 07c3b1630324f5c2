"""Run a case: make its inputs, check every implementation, time those that pass, measure memory, compute the floor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import Any

import torch

from .case import Case, ModesByShape, Shape
from .gate import Verdict, judge_all, short_reason
from .implementations import COMPILED, collect
from .machine import Ceilings, machine_facts, measure_ceilings, source_state, versions, without_paths
from .memory import METHODS, peak_bytes
from .modes import Problem, make_problem
from .results import Accuracy, Floor, Memory, ResultRow, RowKey, RunFacts, Speedup, finite_or_none
from .timing import Timing, TimingPlan, objects_frozen, plan_for, time_calls, time_overhead

SEED = 20240101


@dataclass(frozen=True)
class Settings:
    """The options of the command line."""

    device: torch.device
    preset: str
    backends: tuple[str, ...] = ()  # () = all
    shape_filter: Mapping[str, str] | None = None
    with_compile: bool = True


@dataclass(frozen=True)
class Job:
    case: Case
    shape: Shape


@dataclass(frozen=True)
class RunContext:
    """What is measured once per run and shared by all its rows."""

    settings: Settings
    plan: TimingPlan
    ceilings: Ceilings
    facts: RunFacts
    threads: int


def select_jobs(cases: Sequence[Case], settings: Settings, headlines: ModesByShape) -> list[Job]:
    """List the shapes that a run measures; those of the preset `headline` are the keys of `headlines`, in their order,
    since its time may end before the last."""
    conditions = settings.shape_filter or {}
    order = {key: place for place, key in enumerate(headlines)}
    jobs = []
    for case in cases:
        for shape in case.shapes.get("standard" if settings.preset == "headline" else settings.preset, ()):
            modes = headlines.get((case.name, *shape.identity), ())
            if settings.device.type in shape.devices and shape.matches(conditions):
                if settings.preset != "headline":
                    jobs.append(Job(case, shape))
                elif modes:
                    jobs.append(Job(case, replace(shape, modes=modes)))
    if settings.preset == "headline":
        jobs.sort(key=lambda job: order[(job.case.name, *job.shape.identity)])
    return jobs


def run_facts(device: torch.device, preset: str, ceilings: Mapping[str, Any]) -> RunFacts:
    commit, dirty = source_state()
    return RunFacts(
        timestamp=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        preset=preset,
        commit=commit,
        dirty=dirty,
        machine=machine_facts(device),
        versions=versions(),
        ceilings=dict(ceilings),
    )


def open_run(settings: Settings, jobs: Sequence[Job]) -> RunContext:
    device, preset = settings.device, settings.preset
    ceilings = measure_ceilings(device, {job.shape.dtype for job in jobs}, preset)
    facts = run_facts(device, preset, asdict(ceilings))
    plan = plan_for(preset, facts.machine["last_level_cache_bytes"], device)
    return RunContext(settings, plan, ceilings, facts, torch.get_num_threads())


def run_job(job: Job, context: RunContext, on_mode: Callable[[str], None] = lambda mode: None) -> list[ResultRow]:
    """Return all rows of a case at a shape. An exception of the case becomes a failed row; other cases still run."""
    case, shape = job.case, job.shape
    modes = case.modes_at(shape)
    device = context.settings.device
    generator = torch.Generator(device).manual_seed(SEED)
    rows: list[ResultRow] = []
    mode = modes[0]
    try:
        problem = make_problem(case, shape, device, generator)
        for mode in modes:
            on_mode(mode)
            rows += _run_mode(job, mode, problem, context)
    except Exception as error:  # out of memory in the float64 truth, say
        key = RowKey(case.name, shape.label, shape.dtype, mode, "case", device.type, context.threads)
        rows.append(ResultRow(key, "case", "failed", context.facts, (without_paths(short_reason(error)),)))
    return rows


@objects_frozen()
def _run_mode(job: Job, mode: str, problem: Problem, context: RunContext) -> list[ResultRow]:
    settings = context.settings
    competitors = collect(job.case, problem.inputs, mode, settings.backends, settings.with_compile)
    verdicts = judge_all(competitors, problem, mode, job.shape.dtype)
    passed = {name: verdict for name, verdict in verdicts.items() if verdict.action is not None}
    if mode == "overhead":
        calls = {name: verdict.implementation.call(problem.inputs) for name, verdict in passed.items()}
        timings = time_overhead(calls, settings.device, context.plan)
    else:
        actions = {name: verdict.action for name, verdict in passed.items() if verdict.action is not None}
        timings = time_calls(actions, settings.device, context.plan)
    return [_row(job, mode, verdicts[name], timings, context) for name in competitors]


def _row(
    job: Job, mode: str, verdict: Verdict, timings: Mapping[str, Timing | Exception], context: RunContext
) -> ResultRow:
    name = verdict.implementation.name
    device = context.settings.device
    timing = timings.get(name)
    status, reasons = verdict.status, verdict.reasons
    if isinstance(timing, Exception):
        status, reasons, timing = "failed", (short_reason(timing),), None
    checked = verdict.checked
    return ResultRow(
        key=RowKey(job.case.name, job.shape.label, job.shape.dtype, mode, name, device.type, context.threads),
        kind=verdict.implementation.kind,
        status=status,
        run=context.facts,
        reasons=tuple(map(without_paths, reasons)),
        chosen=verdict.implementation.chosen,
        accuracy=None if checked is None else Accuracy(finite_or_none(checked.error), checked.allowed),
        timing=timing,
        memory=_memory(verdict, device) if timing is not None else None,
        floor=_floor(job, mode, timing, context.ceilings) if timing is not None else None,
        speedup=_speedup(timing, timings) if timing is not None else None,
    )


def _memory(verdict: Verdict, device: torch.device) -> Memory | None:
    if verdict.action is None:
        return None
    return Memory(peak_bytes(verdict.action, device), METHODS[device.type])


def _floor(job: Job, mode: str, timing: Timing, ceilings: Ceilings) -> Floor | None:
    if mode == "overhead":
        return None  # the cost of a call does not depend on bytes or FLOPs
    moved, flops = float(job.case.bytes_moved(job.shape, mode)), float(job.case.flops(job.shape, mode))
    return ceilings.floor_of(timing, moved, flops, job.shape.dtype)


def _speedup(timing: Timing, timings: Mapping[str, Timing | Exception]) -> Speedup:
    def against(rival: str) -> float | None:
        other = timings.get(rival)
        return other.median_us / timing.median_us if isinstance(other, Timing) else None

    return Speedup(against("eager"), against(COMPILED))
