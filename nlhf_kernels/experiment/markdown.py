"""The results as Markdown, for documents: what a run found, in tables that nobody has typed. Speeds are left to the
run's own report: results do not say of which commit they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .figures import JUDGE_LABELS, judges
from .intervals import plus_minus
from .report import describe_claim, describe_cycles, describe_intervals, describe_size

Results = dict[str, Any]


def summary(results: Results) -> str:
    facts = results["tournament"]
    parts = [describe_size(results), describe_intervals(results)]
    for judge, each in judges(results).items():
        parts.append(f"**Judged by {JUDGE_LABELS[judge]}.**")
        parts.append("\n".join(f"- {describe_claim(claim)}" for claim in each["claims"]))
        head = ["row against column", *facts["labels"]]
        rows = [[name, *map(_cell, row)] for name, row in zip(facts["labels"], each["matrix"], strict=True)]
        parts.append(_table(head, rows))
    parts.append("\n".join(f"- {line}" for line in describe_cycles(results)))
    parts.append(_judges(results))
    parts.append(_machine(results))
    return "\n\n".join(part for part in parts if part) + "\n"


def _cell(cell: dict[str, Any] | None) -> str:
    return "" if cell is None else plus_minus(cell["mean"], cell["half"], 2)


def _judges(results: Results) -> str:
    sentences = []
    for name, title in (("preference_model", "Preference model"), ("reward_model", "Reward model")):
        test = results[name]["test"]
        sentences.append(f"{title}: accuracy {test['accuracy']:.3f} on {test['count']} held-out pairs, log-loss "
                         f"{test['log_loss']:.3f}, calibration error {test['calibration_error']:.3f}.")  # fmt: skip
    if results["annotators"] is not None:
        best = results["annotators"]["test"]["ceiling"]
        sentences.append(f"Votes are drawn, so {best:.3f} is the best accuracy that can be expected.")
    return " ".join(sentences)


def _machine(results: Results) -> str:
    machine = results["machine"]
    facts = ", ".join(f"{name} {machine[name]}" for name in ("device", "cores", "threads", "torch", "transformers"))
    return f"Made with {facts}."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
