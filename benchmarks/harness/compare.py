"""Compare two result files: rows that became slower, red or failed, or vanished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .results import ResultRow, RowKey, latest

RIVALS = ("baseline", "compiled")  # kinds of rows that are not the library's


@dataclass(frozen=True)
class Change:
    """One row of the comparison; `ratio` is the new median over the old one."""

    key: RowKey
    verdict: str  # "same", "faster", "slower", "drifted", "red", "failed", "vanished", "new"
    detail: str = ""
    old_us: float | None = None
    new_us: float | None = None

    @property
    def ratio(self) -> float | None:
        return self.new_us / self.old_us if self.old_us and self.new_us else None

    @property
    def is_bad(self) -> bool:
        return self.verdict in ("slower", "red", "failed", "vanished")


def _median(row: ResultRow | None) -> float | None:
    return row.timing.median_us if row is not None and row.timing is not None else None


def _change(key: RowKey, old: ResultRow | None, new: ResultRow | None, fail_above: float) -> Change | None:
    old_us, new_us = _median(old), _median(new)
    if new is not None and new.status in ("red", "failed"):
        return Change(key, new.status, "; ".join(new.reasons), old_us)
    if new_us is None:
        if old_us is None:
            return None  # unavailable before and after: nothing to compare
        detail = "; ".join(new.reasons) if new is not None else "no such row in the new file"
        return Change(key, "vanished", detail, old_us)
    if old_us is None:
        return Change(key, "new", "", None, new_us)
    ratio = new_us / old_us
    verdict = "slower" if ratio > fail_above else "faster" if ratio < 1 / fail_above else "same"
    if verdict != "same" and new is not None and new.kind in RIVALS:
        # Not the library's code: the machine or PyTorch changed, which also affects the other rows of the block.
        verdict = "drifted"
    return Change(key, verdict, "", old_us, new_us)


def compare(old: Sequence[ResultRow], new: Sequence[ResultRow], fail_above: float) -> list[Change]:
    """Compare every row that either file measured; return the bad changes first."""
    if not fail_above >= 1.0:
        raise ValueError(f"compare: --fail-above: expected a ratio of at least 1, got {fail_above}")
    before, after = (latest(row for row in rows if row.kind != "stage") for rows in (old, new))
    keys = list(dict.fromkeys([*before, *after]))
    changes = [_change(key, before.get(key), after.get(key), fail_above) for key in keys]
    return sorted((change for change in changes if change is not None), key=lambda change: not change.is_bad)


def machine_differences(old: Sequence[ResultRow], new: Sequence[ResultRow]) -> list[str]:
    """Return the differing facts that make times incomparable: another processor, another preset."""

    def facts(rows: Sequence[ResultRow]) -> dict[str, set[str]]:
        return {
            "CPU": {str(row.run.machine.get("cpu")) for row in rows},
            "GPU": {str(row.run.machine.get("gpu")) for row in rows},
            "preset": {row.run.preset for row in rows},
        }

    before, after = facts(old), facts(new)
    return [
        f"{name}: {', '.join(sorted(before[name]))} against {', '.join(sorted(after[name]))}"
        for name in before
        if before[name] != after[name]
    ]
