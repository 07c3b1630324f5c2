"""Result rows: one fixed schema, one JSON object per line. README.md beside the cases documents every field."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .timing import Timing

SCHEMA = 1
STATUSES = ("ok", "red", "failed", "unavailable")


@dataclass(frozen=True)
class RowKey:
    """The fields that identify a row across files."""

    case: str
    shape: str
    dtype: str
    mode: str
    implementation: str
    device: str
    threads: int

    def __str__(self) -> str:
        return f"{self.case} [{self.shape} {self.dtype}] {self.mode} {self.implementation} on {self.device}"


@dataclass(frozen=True)
class Accuracy:
    error: float | None  # None: not finite
    allowed: float


@dataclass(frozen=True)
class Floor:
    """The least time this device allows for the bytes and FLOPs of the case."""

    bytes: float
    flops: float
    floor_us: float
    bound_by: str
    percent: float  # of the floor reached: 100 * floor / median


@dataclass(frozen=True)
class Speedup:
    """Time of the rival / time of this row; None if the rival has no time."""

    eager: float | None
    compiled: float | None


@dataclass(frozen=True)
class Memory:
    peak_bytes: int
    method: str


@dataclass(frozen=True)
class RunFacts:
    """Facts that all rows of a run share."""

    timestamp: str  # UTC, ISO 8601
    preset: str
    commit: str | None
    dirty: bool | None
    machine: dict[str, Any]
    versions: dict[str, Any]
    ceilings: dict[str, Any]


@dataclass(frozen=True)
class ResultRow:
    key: RowKey
    kind: str  # backend, variant, part, baseline, compiled; case: the case itself failed; stage: of benchmarks.gpu
    status: str  # one of STATUSES; only "ok" has a time
    run: RunFacts
    reasons: tuple[str, ...] = ()
    chosen: bool = False  # `auto` selects it for this call
    accuracy: Accuracy | None = None
    timing: Timing | None = None
    memory: Memory | None = None
    floor: Floor | None = None
    speedup: Speedup | None = None
    schema: int = field(default=SCHEMA)

    def to_json(self) -> str:
        return json.dumps(asdict(self), allow_nan=False, sort_keys=True)

    @staticmethod
    def from_json(line: str) -> ResultRow:
        data = json.loads(line)
        if data.get("schema") != SCHEMA:
            raise ValueError(f"results: expected schema {SCHEMA}, got {data.get('schema')!r}")
        parts = {"accuracy": Accuracy, "timing": Timing, "memory": Memory, "floor": Floor, "speedup": Speedup}
        for name, kind in parts.items():
            if data[name] is not None:
                data[name] = kind(**data[name])
        data |= {"key": RowKey(**data["key"]), "run": RunFacts(**data["run"]), "reasons": tuple(data["reasons"])}
        return ResultRow(**data)


def finite_or_none(value: float) -> float | None:
    """Replace infinity and NaN, which JSON does not have, by None."""
    return value if math.isfinite(value) else None


def append_rows(path: Path, rows: Iterable[ResultRow]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(row.to_json() + "\n" for row in rows)


def read_rows(path: Path) -> list[ResultRow]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            if line.strip():
                rows.append(ResultRow.from_json(line))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path.name}, line {number}: {type(error).__name__}: {error}") from error
    return rows


def same_code(one: RunFacts, other: RunFacts) -> bool:
    """Return whether two runs measured the same code on the same machine; False if the tree had uncommitted changes."""
    is_comparable = one.commit is not None and not one.dirty and not other.dirty
    return is_comparable and (one.commit, one.machine, one.versions) == (other.commit, other.machine, other.versions)


def measured_keys(path: Path | None, facts: RunFacts) -> list[RowKey]:
    """Return the keys of a file's rows of the same code, preset and machine."""
    rows = read_rows(path) if path is not None and path.exists() else []
    return [row.key for row in rows if row.run.preset == facts.preset and same_code(row.run, facts)]


def measured_shapes(path: Path | None, facts: RunFacts) -> set[tuple[str, str, str]]:
    """Return case, shape and dtype of a file's rows of the same code, preset and machine."""
    return {(key.case, key.shape, key.dtype) for key in measured_keys(path, facts)}


def latest(rows: Iterable[ResultRow]) -> dict[RowKey, ResultRow]:
    """Return the last row of each key: files are appended to."""
    return {row.key: row for row in rows}
