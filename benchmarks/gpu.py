"""Run everything that needs a GPU within a time budget, the most important stages first.

Stages: build for this card, tests marked `gpu`, headline rows, rollouts, training updates, one model's scores beside
other libraries, sanitizers, then all other shapes. Each stage appends its results to the file as it measures them; a
second run at the same commit on the same machine skips the stages that have finished. The output ends with a table:
ours, the best rival, their ratio, the share of the floor, the target, and whether it is met.

It runs in the active environment, which needs PyTorch with CUDA, Triton, nvcc, pybind11, pytest and preferably
pytest-xdist. Rivals are measured if installed: flashinfer-python, liger-kernel[cutedsl], quack-kernels,
cut-cross-entropy, trl==1.13.0.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness.machine import COMMIT_VARIABLE, ROOT
from benchmarks.harness.results import ResultRow, RowKey, RunFacts, append_rows, read_rows, same_code
from benchmarks.harness.runner import run_facts
from benchmarks.harness.stages import Outcome, Stage, run_stages
from benchmarks.harness.timing import summarise
from benchmarks.targets import HEADLINES, headlines_of, phase_lines, table
from benchmarks.train_step import TRL

CASE, KIND = "gpu", "stage"  # of the rows that hold the outcome of a stage
#: Tools of compute-sanitizer. Not initcheck: kernels read whole blocks of 16 bytes at the end of a row.
TOOLS = ("memcheck", "racecheck", "synccheck")
TOOL_S = 40.0  # a tool's least time: loading PyTorch under it takes half of that
WORKERS = 8  # pytest processes; more would compile the same kernels at the same time
MAX_LINES = 60
FAILED = "failed: "  # begins a line of tests/conftest.py's --failures-at-once
CHECK_BUILD = """
from nlhf_kernels.core.capabilities import native_missing
raise SystemExit(native_missing("_cuda") or 0)
"""
MAX_FAILURES = 20  # lines about failed tests
#: Without --strict-config: pytest-timeout may be absent.
PYTEST = (sys.executable, "-m", "pytest", "-q", "--failures-at-once", "-o", "addopts=-ra")


def make_stages(device: torch.device, preset: str, out: Path) -> list[Stage]:
    """List the stages by importance.

    Shares are such that in nine minutes the first five have what they need, whatever comes after them: 50 s for the
    build, about 100 for each other one. What they leave goes to the rest. Where there are two calls of less than five
    minutes, `--stages build headlines rollout` and `--stages tests train_step one_model` measure every target.
    """
    tiny = preset == "tiny"
    no_gpu = "" if device.type == "cuda" else f"needs a GPU; got --device {device.type}"
    no_more = "preset tiny has no more shapes" if tiny else ""

    def benchmark(name: str, preset: str, *options: str) -> tuple[str, ...]:
        preset_options = ("--preset", "tiny") if tiny else ("--preset", preset, *options)
        return (sys.executable, "-m", f"benchmarks.{name}", "--device", device.type, "--out", str(out), "--resume",
                *preset_options)  # fmt: skip

    def rollout(width: int, *options: str) -> tuple[str, ...]:
        rounds = ("--repeats", "2", "--shape", f"width={width}", *options)
        return benchmark("rollout", "headline", "--rival", "eager", *rounds)  # at 3584 after all that has a target

    def update(new: int) -> tuple[str, ...]:
        return benchmark("train_step", "headline", "--rival", TRL, "--repeats", "2", "--shape", f"new={new}")

    products = ("896x1152", "896x896", "896x9728", "4864x896", "3584x4608", "3584x3584", "3584x37888", "18944x3584")
    tune = (sys.executable, "-m", "nlhf_kernels", "tune", "--minutes", "0.9", "--rows", "32", "--products", *products)
    few = ("--no-compile", "--case", "mirror_descent", "--backend", "torch", "cpu")
    headlines = (*benchmark("run", "headline", "--no-compile"), *(few if tiny else ()))
    sweeps = tuple(benchmark(name, "standard") for name in ("run", "rollout", "train_step"))
    return [
        _build(device, no_gpu),
        Stage("tests", 120, (_tests(1 if tiny else None),)),
        Stage("headlines", 105, (headlines,)),
        Stage("rollout", 160, (rollout(896),) if tiny else (rollout(896), rollout(3584)), least=0 if tiny else 70),
        Stage("train_step", 100, (update(64),) if tiny else (update(64), update(256)), least=0 if tiny else 45),
        Stage("one_model", 20, (benchmark("one_model", "headline", "--patience", "25"),), least=0 if tiny else 30),
        Stage(
            "sanitizers",
            4,
            tuple(map(_sanitizer, TOOLS)),
            missing=no_gpu or _no_program("compute-sanitizer"),
            least=TOOL_S,
        ),
        Stage(
            "plans",
            12,
            (tune, rollout(896, "--tuned"), rollout(3584, "--tuned")),
            {"NLHF_KERNELS_TUNING": str(out.with_suffix(".plans.json"))},
            missing=no_gpu,
            least=65,  # tune keeps its plans at its end
        ),
        Stage("sweeps", 3, sweeps, missing=no_more),
        Stage("growth", 1, (benchmark("run", "growth", "--no-compile"),), missing=no_more),
    ]


def _build(device: torch.device, no_gpu: str) -> Stage:
    """Compile for this card's architecture only: each further one would take as long again.

    The share is such that four minutes are enough for it, since nothing after it works without. setup.py leaves out a
    module that it cannot build and ends without an error, so a second command asks for the module.
    """
    architecture = "" if no_gpu else "{}{}".format(*torch.cuda.get_device_capability(device))
    command = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
    environment = {"CUDAARCHS": architecture}
    return Stage("build", 200, (command, (sys.executable, "-c", CHECK_BUILD)), environment, missing=no_gpu, least=15)


def _tests(count: int | None) -> tuple[str, ...]:
    """Run the tests marked `gpu` of the first `count` files (None: of all files)."""
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_gpu_*.py"))[:count]
    workers = ("-n", str(WORKERS)) if count is None and importlib.util.find_spec("xdist") else ()
    return (*PYTEST, "-m", "gpu", *workers, *files)


def _sanitizer(tool: str) -> tuple[str, ...]:
    """Run the ops' tests under one tool, on small problems only: the tools slow kernels down a hundredfold."""
    small = "cuda and not large and not two_to and not tail and not often"
    rooms = (f"tests/test_{room}.py" for room in ("mirror_descent", "row_uniforms", "mixture_sample"))
    return ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *PYTEST, "-x", *rooms, "-k", small)


def _no_program(name: str) -> str:
    return "" if shutil.which(name) else f"no {name} found"


def finished_stages(rows: Sequence[ResultRow], facts: RunFacts) -> dict[str, Outcome]:
    """Return the stages that a run of this code, preset and machine has finished; the build only if it is there."""
    finished = {}
    for row in rows:
        if row.kind == KIND and row.run.preset == facts.preset and same_code(row.run, facts) and row.timing is not None:
            finished[row.key.implementation] = Outcome("ok", row.timing.median_us / 1e6)
    if not list((ROOT / "nlhf_kernels").glob("_cuda*.so")):
        finished.pop("build", None)
    return finished


def stage_row(stage: Stage, outcome: Outcome, facts: RunFacts, device: torch.device) -> ResultRow:
    """Make the result row of a stage: its time if it finished, else the reasons."""
    key = RowKey(CASE, "", "", KIND, stage.name, device.type, torch.get_num_threads())
    timing = summarise([1e6 * outcome.seconds], 0) if outcome.status == "ok" else None
    return ResultRow(key, KIND, outcome.status, facts, outcome.reasons, timing=timing)


def closing_lines(rows: Sequence[ResultRow], outcomes: dict[str, Outcome], facts: RunFacts, log: Path) -> list[str]:
    """Return the summary: headline table, phases of updates, stage outcomes, machine; at most MAX_LINES."""
    headlines = headlines_of(rows, facts.preset) if facts.preset == "tiny" else HEADLINES
    where = (
        f"{facts.machine['gpu'] or facts.machine['cpu']}, torch {facts.versions['torch']}, commit "
        f"{(facts.commit or 'unknown')[:10]}{'+changes' if facts.dirty else ''}; log: {log.name}"
    )
    ends = [*phase_lines(rows, headlines), *(f"{name:<12}{outcome}" for name, outcome in outcomes.items())]
    return [*table(rows, headlines, MAX_LINES - len(ends) - 1), *ends, where]


def failures(log: Path, begin: int) -> list[str]:
    """Return the lines about failed tests in what a run has added to the log."""
    with log.open("rb") as file:
        file.seek(begin)
        lines = file.read().decode(errors="replace").splitlines()
    return list(dict.fromkeys(line for line in lines if line.startswith(FAILED)))[:MAX_FAILURES]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--minutes", type=_minutes, default=9.0, help="for all of it (default 9)")
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="only these (default: all)")
    parser.add_argument("--preset", choices=("tiny", "standard"), default="standard", help="tiny: a smoke test")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="default: benchmarks/results/CARD.jsonl")
    parser.add_argument("--commit", type=_commit, help="of the sources, where they are a copy without .git")
    return parser


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of minutes above 0; got {text!r}")
    return value


def _commit(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{7,40}", text):
        raise argparse.ArgumentTypeError(f"expected 7 to 40 hexadecimal digits; got {text!r}")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected cpu, for PyTorch sees no GPU here; got cuda")
    if arguments.commit:
        os.environ[COMMIT_VARIABLE] = arguments.commit  # every stage is a process of its own
    facts = run_facts(device, arguments.preset, {})
    card = re.sub(r"\W+", "-", facts.machine["gpu"] or "cpu").lower()
    out = (arguments.out or ROOT / "benchmarks" / "results" / f"{card}.jsonl").resolve()
    stages = make_stages(device, arguments.preset, out)
    names = [stage.name for stage in stages]
    if unknown := set(arguments.stages or ()) - set(names):
        parser.error(f"--stages: expected some of {', '.join(names)}; got {', '.join(sorted(unknown))}")
    stages = [stage for stage in stages if arguments.stages is None or stage.name in arguments.stages]
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.with_suffix(".log")

    def tell(stage: Stage, outcome: Outcome) -> None:
        if outcome.status != "done":
            append_rows(out, [stage_row(stage, outcome, facts, device)])
        print(f"{stage.name:<12}{outcome}", flush=True)

    rows, begin = read_rows(out) if out.exists() else [], log.stat().st_size if log.exists() else 0
    outcomes = run_stages(stages, 60 * arguments.minutes, log, finished_stages(rows, facts), tell)
    now = [row for row in read_rows(out) if same_code(row.run, facts) or row.run.timestamp >= facts.timestamp]
    print("", *failures(log, begin), sep="\n")
    print("", *closing_lines(now, outcomes, facts, log), sep="\n")
    return 1 if any(outcome.status == "failed" for outcome in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
