"""The README's speed tables, from the result files kept here: `python -m benchmarks.headlines`.

Each line compares one measured row with a rival's row of the same run. A test compares README.md with this output: a
table for each GPU that has a file, then the CPU's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.harness.report import format_ratio, format_us
from benchmarks.harness.results import ResultRow, RowKey, latest, read_rows
from benchmarks.targets import measured_cells
from nlhf_kernels.core.text import markdown_table

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Headline:
    what: str
    file: str
    key: RowKey
    rival: str  # an implementation of the same problem
    name: str  # of the rival, as printed


def _cpu(case: str, shape: str, mode: str, implementation: str = "cpu", dtype: str = "float32") -> RowKey:
    return RowKey(case, shape, dtype, mode, implementation, "cpu", 1)


_OPS, _EAGER = "cpu-1-thread.jsonl", "PyTorch"
_LOGITS = "tokens=2048 length=512 vocabulary=32000 models=policy"
_ROLLOUT = "prompts=4 prompt=64 new=128 width=256 layers=4 vocabulary=32000"
_UPDATE = "prompts=8 prompt=64 new=32 width=256 layers=4 vocabulary=32000"
HEADLINES = (
    Headline(
        "draw from the mixture, 32 rows of 131,072 tokens",
        _OPS, _cpu("mixture_sample", "rows=32 vocabulary=131072", "forward"), "eager", _EAGER,
    ),
    Headline(
        "log-probabilities and gradient, 2,048 x 32,000, in place",
        _OPS, _cpu("logprobs", _LOGITS, "full", "cpu, in place"), "eager", _EAGER,
    ),
    Headline("the same, into a new tensor", _OPS, _cpu("logprobs", _LOGITS, "full"), "eager", _EAGER),
    Headline(
        "Nash-MD, 20 steps of 1,024 games of 64 actions",
        _OPS, _cpu("mirror_descent", "games=1024 actions=64 steps=20", "forward"), "eager", _EAGER,
    ),
    Headline(
        "y and y' for 4 prompts, 128 new tokens, two small Llamas",
        _OPS, _cpu("rollout", _ROLLOUT, "forward", "engine"), "eager", "a loop with two caches",
    ),
    Headline(
        "the same",
        _OPS, _cpu("rollout", _ROLLOUT, "forward", "engine"),
        "TRL 1.13's way, transcribed", "TRL 1.13's way, transcribed",
    ),
    Headline(
        "an update of training, 8 prompts, 32 new tokens",
        _OPS, _cpu("train_step", _UPDATE, "full", "NashTrainer"), "TRL 1.13.0", "TRL 1.13.0",
    ),
)  # fmt: skip


def table() -> str:
    """Return the table in Markdown, followed by the machine and the commits."""
    files = {name: latest(read_rows(RESULTS / name)) for name in sorted({headline.file for headline in HEADLINES})}
    rows, runs = [], []
    for headline in HEADLINES:
        ours = _timed(files[headline.file], headline.key)
        theirs = _timed(files[headline.file], replace(headline.key, implementation=headline.rival))
        if ours.run != theirs.run:
            raise ValueError(f"headlines: {headline.what}: expected both rows of one run; got {headline.file}'s of two")
        assert ours.timing is not None and theirs.timing is not None
        time, other = ours.timing.median_us, theirs.timing.median_us
        ratio = format_ratio(other / time)
        rows.append((headline.what, format_us(time), f"{headline.name}, {format_us(other)}", ratio))
        runs.append(ours.run)
    commits = ", ".join(sorted({(run.commit or "unknown")[:7] for run in runs}))
    machines = ", ".join(
        sorted({str(run.machine["cpu"] if not run.machine["gpu"] else run.machine["gpu"]) for run in runs})
    )
    lines = markdown_table(("what", "this library", "rival", "faster"), rows)
    return f"{lines}\n\nMedians on one thread of {machines}, float32, at {commits}: `python -m benchmarks.headlines`."


def gpu_tables() -> list[str]:
    """Return a table in Markdown of each GPU's results, with the machine and the commits; none where none are kept."""
    tables = []
    for path in sorted(RESULTS.glob("*.jsonl")):
        rows = [row for row in read_rows(path) if row.key.device == "cuda"]
        cells = measured_cells(rows)
        if not cells:
            continue
        runs = [row.run for row in rows if row.timing is not None]
        cards, commits, torches = (
            ", ".join(sorted({str(fact) for fact in facts}))
            for facts in (
                [run.machine["gpu"] for run in runs],
                [(run.commit or "unknown")[:7] for run in runs],
                [run.versions["torch"] for run in runs],
            )
        )
        lines = markdown_table(("what", "this library", "best rival", "faster", "of the floor", "target", "met"), cells)
        tables.append(
            f"{lines}\n\nMedians on {cards}, torch {torches}, at {commits}: `benchmarks/results/{path.name}`."
        )
    return tables


def _timed(rows: dict[RowKey, ResultRow], key: RowKey) -> ResultRow:
    row = rows.get(key)
    if row is None or row.timing is None:
        raise ValueError(f"headlines: expected a row with a time for {key}, {key.threads} threads; got none")
    return row


if __name__ == "__main__":
    print(*gpu_tables(), table(), sep="\n\n")
