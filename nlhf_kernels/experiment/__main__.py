"""Draws a report again from a results file: `python -m nlhf_kernels.experiment results.json --out folder`.

The tables of `docs/experiment.md` come from `--markdown`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from . import report as texts_report
from .candidates import report as candidates_report
from .workspace import read_json


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m nlhf_kernels.experiment", description=__doc__)
    parser.add_argument("results", type=Path, help="results.json of an experiment")
    parser.add_argument("--out", type=Path, help="folder for report.html and its figures")
    parser.add_argument("--markdown", action="store_true", help="print the numbers as Markdown")
    arguments = parser.parse_args(argv)
    results = read_json(arguments.results)
    report = candidates_report if results.get("experiment") == "candidates" else texts_report
    if arguments.markdown:
        print(report.summary(results), end="")
    if arguments.out is not None:
        print(f"Report: {report.write_report(results, arguments.out)}")
    if not arguments.markdown and arguments.out is None:
        parser.error("expected --out, --markdown or both")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
