"""Launch plans: the integers that configure a kernel's launch, by default or as tuned for this GPU.

A room makes one `Tunable` for each kernel and backend, which chooses the plan of every launch. `nlhf-kernels tune`
measures the candidates and keeps the fastest in a file, by GPU, kernel sources and workload. A plan changes the speed,
not the result. The file is read at a process's first launch on a GPU, and never for a CPU.
"""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch

from . import capabilities, settings
from .atomic import write_atomic
from .text import parse_json, read_text

_log = logging.getLogger(__name__)

SCHEMA = 1
PACKAGE = Path(__file__).resolve().parent.parent
LEAST_GAIN = 1.02  # a plan that is faster by less than that is noise
FLUSH_BYTES = 256 << 20  # written between two repeats, so that the inputs come from memory
FLUSHES = 5  # the GPU must still be busy when the host has launched the kernel, or its time counts too

Numbers = tuple[int, ...]
Plan = TypeVar("Plan", bound=Numbers)  # a NamedTuple of integers


class Workload(NamedTuple):
    """What a plan is chosen for."""

    rows: int  # rounded up to a power of two; 0: any number, where a row's rounding must not depend on the batch
    sizes: Numbers  # exact
    dtypes: str  # "bfloat16", or of two models "bfloat16 float32"
    variant: str = ""  # what else changes the kernel: "filtered"

    def __str__(self) -> str:
        sizes = " x ".join(map(str, (self.rows or "any", *self.sizes)))
        return " ".join(filter(None, (sizes, self.dtypes, self.variant)))


def make_workload(rows: int, sizes: Iterable[int], tensors: Sequence[torch.Tensor], variant: str = "") -> Workload:
    """Describe a launch by its sizes and the dtypes of `tensors`."""
    dtypes = " ".join(dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in tensors))
    return Workload(1 << (rows - 1).bit_length() if rows else 0, tuple(sizes), dtypes, variant)


class Tunable(Generic[Plan]):
    """The launches of one kernel.

    Args:
        op (str): the room.
        backend (str): triton or cuda.
        plan_type (type): a NamedTuple of integers.
        candidates (callable): the default plan of a workload -> plans worth a measurement.
        rival (str): a backend that `auto` prefers unless a plan is measured faster; "" where plans only compete with
            each other.
    """

    instances: ClassVar[dict[tuple[str, str], Tunable[Any]]] = {}

    def __init__(
        self,
        op: str,
        backend: str,
        plan_type: type[Plan],
        candidates: Callable[[Plan], Iterable[Plan]],
        rival: str = "",
    ) -> None:
        self.op, self.backend, self.plan_type, self.candidates = op, backend, plan_type, candidates
        self.rival = rival
        self.instances[op, backend] = self

    def make(self, numbers: Iterable[int]) -> Plan:
        plan: Any = self.plan_type
        result: Plan = plan(*numbers)
        return result

    def plan(self, device: torch.device, workload: Workload, default: Plan) -> Plan:
        """Choose the plan of a launch: that of `use_plan`, else the tuned one, else `default`."""
        if _launches is not None:
            _launches.append(Launch(self, workload, default))
        numbers = _forced.get().get((self.op, self.backend))
        if numbers is None and device.type == "cuda":
            numbers = tuned_plans(card_name(device)).get((self.op, self.backend, workload))
        return default if numbers is None else self.make(numbers)


class Launch(NamedTuple):
    """A launch that `record_launches` recorded."""

    tunable: Tunable[Any]
    workload: Workload
    default: Numbers


_forced: ContextVar[dict[tuple[str, str], Numbers]] = ContextVar("nlhf_kernels_plans", default={})  # noqa: B039
_launches: list[Launch] | None = None  # one list for all threads: autograd runs backward passes in its own
_generation = 0


def is_overridden() -> bool:
    """Return whether `use_plan` or `record_launches` is active, so that each launch must ask for its plan."""
    return _launches is not None or bool(_forced.get())


def generation() -> int:
    """Return a number that changes when tuned plans may have changed."""
    return _generation


def forget_plans() -> None:
    """Read the file of tuned plans again at the next launch."""
    global _generation
    _generation += 1
    tuned_plans.cache_clear()


@contextmanager
def use_plan(tunable: Tunable[Plan], plan: Plan) -> Iterator[None]:
    """Launch `tunable`'s kernel with `plan` inside the block, whatever the workload (in this thread or task only)."""
    token = _forced.set({**_forced.get(), (tunable.op, tunable.backend): plan})
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Yield a list to which every launch of a tunable kernel inside the block is appended."""
    global _launches
    before, _launches = _launches, []
    try:
        yield _launches
    finally:
        _launches = before


# ---- measuring -------------------------------------------------------------------------------------------------------


class Sweep(NamedTuple):
    """The candidates of one launch, measured: plan -> median in microseconds, or why it has none."""

    launch: Launch
    medians: dict[Numbers, float | str]
    rival_us: float | None = None  # median of the tunable's rival backend

    @property
    def default_us(self) -> float:
        return float(self.medians[self.launch.default])

    @property
    def best(self) -> Numbers:
        """The fastest plan; the default where none is faster by more than noise."""
        measured = {plan: median for plan, median in self.medians.items() if isinstance(median, float)}
        fastest = min(measured, key=measured.__getitem__)
        return fastest if measured[fastest] * LEAST_GAIN < self.default_us else self.launch.default

    @property
    def beats_rival(self) -> bool:
        """Whether the best plan is faster than the rival by more than noise; True without a rival."""
        return self.rival_us is None or float(self.medians[self.best]) * LEAST_GAIN < self.rival_us


def sweep(
    calls: Sequence[Callable[[], Any]],
    launch: Launch,
    seconds: float,
    median_us: Callable[[Callable[[], Any], float], float],
    on_plan: Callable[[], None] = lambda: None,
    rivals: Sequence[Callable[[], Any]] = (),
) -> Sweep:
    """Measure the candidates of a launch until the time is up, the default first.

    Args:
        calls (callables): each makes the launch, for example with different numbers of rows; times are summed. Their
            tensors are compared with those of the default plan, to reject a plan that changes a result.
        launch (Launch): of `record_launches`.
        seconds (float): for all candidates together.
        median_us (callable): (call, seconds) -> microseconds.
        on_plan (callable): called after each candidate.
        rivals (callables): the same calls on the tunable's rival backend, measured first.
    """
    default = launch.tunable.make(launch.default)
    plans = list(dict.fromkeys([default, *launch.tunable.candidates(default)]))
    deadline = time.monotonic() + seconds
    medians: dict[Numbers, float | str] = {}
    rival_us = sum(median_us(call, seconds / (len(plans) + 1) / len(rivals)) for call in rivals) if rivals else None
    # Detached: a graph of gradients that stays alive keeps its leaf's node on this stream, and the gradients of a call
    # that is recorded on another one would wait for it.
    truth = [[tensor.detach() for tensor in tensors_of(call())] for call in calls]
    for index, plan in enumerate(plans):
        left = deadline - time.monotonic()
        if left <= 0 and index:
            medians[plan] = "no time left"
            continue
        with use_plan(launch.tunable, plan):
            try:
                share = max(left, 0.0) / (len(plans) - index) / len(calls)
                pairs = zip(calls, truth, strict=True)
                if plan == default or all(_agree(tensors_of(call()), expected) for call, expected in pairs):
                    medians[plan] = sum(median_us(call, share) for call in calls)
                else:
                    medians[plan] = "another result"
            except Exception as error:  # a plan that needs more registers or shared memory than there are
                if plan == default:
                    raise
                medians[plan] = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        on_plan()
    return Sweep(launch, medians, rival_us)


def tensors_of(result: Any) -> list[torch.Tensor]:
    """Return the tensors of a call's result: a tensor, a tuple, or an object that lists its fields."""
    if isinstance(result, torch.Tensor):
        return [result]
    parts = vars(result).values() if hasattr(result, "__dict__") else result or ()
    return [part for part in parts if isinstance(part, torch.Tensor)]


def _agree(result: list[torch.Tensor], truth: list[torch.Tensor]) -> bool:
    """Return whether a plan's result equals the default's, up to rounding."""
    for ours, expected in zip(result, truth, strict=True):
        if expected.is_floating_point():
            roundings = 64 * torch.finfo(expected.dtype).eps
            same = torch.allclose(ours.double(), expected.double(), rtol=roundings, atol=roundings, equal_nan=True)
        else:
            same = torch.equal(ours, expected)
        if not same:
            return False
    return True


def median_on(device: torch.device) -> Callable[[Callable[[], Any], float], float]:
    """Make a `median_us` for `sweep`: cold caches, GPU events, at least 5 repeats and at most 100.

    A call is replayed from a CUDA graph: a launch costs the host more than many kernels cost the GPU, and the flush
    covers the launch of a graph.
    """
    flush = torch.empty(FLUSH_BYTES if device.type == "cuda" else 1, dtype=torch.uint8, device=device)

    def sample_us(call: Callable[[], Any]) -> float:
        for _ in range(FLUSHES):
            flush.zero_()
        if device.type != "cuda":
            start = time.perf_counter_ns()
            call()
            return (time.perf_counter_ns() - start) / 1e3
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3

    def median_us(call: Callable[[], Any], seconds: float) -> float:
        for _ in range(2):
            sample_us(call)  # compiles, warms up
        call = _recorded(call) if device.type == "cuda" else call
        samples: list[float] = []
        deadline = time.monotonic() + seconds
        while len(samples) < 5 or (len(samples) < 100 and time.monotonic() < deadline):
            samples.append(sample_us(call))
        return statistics.median(samples)

    return median_us


def _recorded(call: Callable[[], Any]) -> Callable[[], Any]:
    """Record a call in a CUDA graph and return its replay; `call` itself where it cannot be recorded."""
    graph = torch.cuda.CUDAGraph()
    try:
        # The outer stream: where the end of a recording fails, PyTorch leaves the recording's stream current.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        _log.info("tune: a call is measured without a CUDA graph: %s", error)
        return call
    return graph.replay


# ---- the file --------------------------------------------------------------------------------------------------------


def plans_file() -> Path | None:
    """Return the file of tuned plans; None where NLHF_KERNELS_TUNING is off."""
    if settings.tuning == "off":
        return None
    return Path(settings.tuning) if settings.tuning else Path.home() / ".cache" / "nlhf_kernels" / "plans.json"


@cache
def card_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


@cache
def sources_digest(op: str, backend: str) -> str:
    """Return a digest of the sources of a backend's kernels: plans for other sources are not used."""
    digest = hashlib.sha256()
    if backend == "cuda":
        digest.update(Path(str(capabilities.native("_cuda").__file__)).read_bytes())
    else:
        for path in sorted((PACKAGE / "ops" / op).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


Tuned = dict[tuple[str, str, Workload], Numbers]


@cache
def tuned_plans(card: str) -> Tuned:
    """Return a GPU's tuned plans for the current kernels. A file that cannot be read is ignored with one warning."""
    path = plans_file()
    if path is None or not path.exists():
        return {}
    try:
        entries = _read(path).get(card, [])
        return {
            (entry["op"], entry["backend"], _workload(entry)): _numbers(entry)
            for entry in entries
            if entry["sources"] == sources_digest(entry["op"], entry["backend"])
        }
    except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        detail = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"{path}: expected launch plans that `nlhf-kernels tune` wrote; going on without ({detail})",
            stacklevel=2,
        )
        return {}


def is_tuned(op: str, backend: str, device: torch.device, workload: Workload) -> bool:
    """Return whether the file has a plan for this workload on this GPU: its kernel has beaten any rival there."""
    return (op, backend, workload) in tuned_plans(card_name(device))


def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
    content = parse_json(read_text(path))
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or not isinstance(content.get("cards"), dict):
        raise ValueError(f'no "schema": {SCHEMA} and "cards" in it')
    cards: dict[str, list[dict[str, Any]]] = content["cards"]
    return cards


def _workload(entry: dict[str, Any]) -> Workload:
    rows, sizes, dtypes, variant = entry["workload"]
    return Workload(int(rows), tuple(map(int, sizes)), str(dtypes), str(variant))


def _numbers(entry: dict[str, Any]) -> Numbers:
    tunable = Tunable.instances.get((entry["op"], entry["backend"]))
    names, plan = getattr(tunable and tunable.plan_type, "_fields", None), entry["plan"]
    if names is not None and tuple(plan) != names:
        raise ValueError(f"plan of {entry['op']}: expected the numbers {', '.join(names)}; got {', '.join(plan)}")
    if not all(type(number) is int and number > 0 for number in plan.values()):
        raise ValueError(f"plan of {entry['op']}: expected positive integers; got {plan}")
    return tuple(plan.values())


def keep(card: str, sweeps: Iterable[Sweep]) -> Path | None:
    """Write the best plans of `sweeps` to the file; keep its entries for other GPUs, ops and workloads.

    A workload whose rival is faster has no entry.

    Returns the file, or None where NLHF_KERNELS_TUNING is off.
    """
    path = plans_file()
    if path is None:
        return None
    try:
        cards = _read(path) if path.exists() else {}
    except ValueError as error:
        expected = "expected a file that `nlhf-kernels tune` wrote, or none"
        raise ValueError(f"{path}: {expected}: {error}. Delete it, or name another in NLHF_KERNELS_TUNING") from None
    entries = {(entry["op"], entry["backend"], str(entry["workload"])): entry for entry in cards.get(card, [])}
    for result in sweeps:
        tunable, workload, _ = result.launch
        plan = dict(zip(tunable.plan_type._fields, result.best, strict=True))
        entry = {
            "op": tunable.op, "backend": tunable.backend, "sources": sources_digest(tunable.op, tunable.backend),
            "workload": [workload.rows, list(workload.sizes), workload.dtypes, workload.variant], "plan": plan,
            "median_us": result.medians[result.best], "default_us": result.default_us,
        }  # fmt: skip
        key = tunable.op, tunable.backend, str(entry["workload"])
        entries.pop(key, None)
        if result.beats_rival:
            entries[key] = entry
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"schema": SCHEMA, "cards": {**cards, card: list(entries.values())}}
    write_atomic(path, json.dumps(content, indent=1) + "\n")
    forget_plans()
    return path
