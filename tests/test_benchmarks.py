"""The benchmark harness: statistics, the red gate, comparison and exit codes, files, memory, plots, the real cases."""

from __future__ import annotations

import os
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

from benchmarks import run
from benchmarks.cases import all_cases
from benchmarks.harness import check, implementations, memory, report, results, timing
from benchmarks.harness.case import Baseline, Case, Inputs, Shape, Unavailable
from benchmarks.harness.compare import compare
from benchmarks.harness.library import BackendReport, backend_report
from benchmarks.harness.machine import last_level_cache_bytes, parse_size
from benchmarks.targets import HEADLINES

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
INFINITE = float("inf")
TINY = ["--preset", "tiny", "--device", "cpu"]


def right(x: torch.Tensor) -> torch.Tensor:
    exponentials = (x - x.amax(-1, keepdim=True)).exp()
    return exponentials / exponentials.sum(-1, keepdim=True)


def wrong(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x * 1.001, -1)


def wrong_gradient(x: torch.Tensor) -> torch.Tensor:
    """Return the right result with a gradient that is 0.1 % off."""
    y = torch.softmax(x, -1)
    return y.detach() + 1.001 * (y - y.detach())


def crashing(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("it said it could run")


def toy_case(**changes: Any) -> Case:
    case = Case(
        name="toy",
        op="toy",
        shapes={preset: [Shape({"rows": 4, "columns": 33})] for preset in ("tiny", "standard")},
        make=lambda shape, device, generator: Inputs(
            (torch.randn(shape.sizes["rows"], shape.sizes["columns"], device=device, generator=generator),)
        ),
        truth=partial(torch.softmax, dim=-1),
        baselines={"eager": Baseline(partial(torch.softmax, dim=-1))},
        bytes_moved=lambda shape, mode: 8.0 * shape.sizes["rows"] * shape.sizes["columns"],
        flops=lambda shape, mode: 0.0,
    )
    return replace(case, **changes)


@pytest.fixture
def run_toy(monkeypatch, tmp_path):
    """Run a toy case with the given backends through the command line; returns exit code and rows by name."""

    def run_it(backends: dict[str, Any], *arguments: str, **changes: Any):
        reasons = {name: list(function) if isinstance(function, tuple) else [] for name, function in backends.items()}
        monkeypatch.setattr(run, "all_cases", lambda: {"toy": toy_case(**changes)})
        monkeypatch.setattr(implementations, "backend_report", lambda *call: BackendReport(reasons, "right"))
        monkeypatch.setattr(implementations, "backend_call", lambda op, name: backends[name])
        out = tmp_path / "results" / "toy.jsonl"
        out.unlink(missing_ok=True)
        code = run.main([*TINY, "--out", str(out), *arguments])
        return code, {(row.key.mode, row.key.implementation): row for row in results.read_rows(out)}

    return run_it


def row_with(median: float | None, status: str = "ok", implementation: str = "cpu", **key: Any) -> results.ResultRow:
    names = {"case": "toy", "shape": "n=1", "dtype": "float32", "mode": "forward", "device": "cpu", "threads": 1}
    timed = None if median is None else timing.Timing(median, median, median, 5, "hot", 0)
    facts = results.RunFacts("2026-01-01T00:00:00+00:00", "tiny", None, None, {"cpu": "c", "gpu": None}, {}, {})
    return results.ResultRow(
        results.RowKey(**{**names, "implementation": implementation, **key}),
        kind="baseline" if implementation == "eager" else "backend",
        status=status,
        run=facts,
        reasons=() if status == "ok" else ("because",),
        accuracy=results.Accuracy(None, 1e-6),
        timing=timed,
        memory=results.Memory(8, "counted"),
        floor=None if median is None else results.Floor(8, 0, 0.5, "bandwidth", 50 / median),
        speedup=None if median is None else results.Speedup(2.0, None),
    )


# --- statistics


def test_percentiles_interpolate_between_samples() -> None:
    assert timing.percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert timing.percentile([1.0, 2.0], 0.2) == pytest.approx(1.2)
    assert timing.percentile([7.0], 0.8) == 7.0
    summary = timing.summarise(list(range(101)), 0)
    assert (summary.median_us, summary.p20_us, summary.p80_us, summary.repeats) == (50, 20, 80, 101)
    with pytest.raises(ValueError, match="at least one sample"):
        timing.percentile([], 0.5)


def test_rivals_take_turns_and_respect_budget_and_least_repeats() -> None:
    order: list[str] = []
    actions = {
        name: timing.Action(lambda: None, lambda _, name=name: order.append(name)) for name in ("first", "second")
    }
    plan = timing.TimingPlan(budget_s=0.0, min_repeats=3, max_repeats=9, warmups=0, batch_s=0.0, flush_bytes=64)
    timed = timing.time_calls(actions, CPU, plan)
    assert order == ["first", "second"] * 3, "no budget: the least repeats, in turn"
    assert {entry.repeats for entry in timed.values()} == {3}
    assert timed["first"].cache == "cold"


def test_preparation_is_not_timed() -> None:
    def slow() -> None:
        timing.time.sleep(0.02)

    plan = timing.TimingPlan(budget_s=0.0, min_repeats=3, max_repeats=3, warmups=1, batch_s=0.0, flush_bytes=0)
    timed = timing.time_calls(
        {"prepared": timing.Action(slow, lambda _: None), "run": timing.Action(lambda: None, lambda _: slow())},
        CPU,
        plan,
    )
    assert timed["prepared"].median_us < 10_000 < timed["run"].median_us


def test_overhead_is_per_call() -> None:
    plan = timing.TimingPlan(budget_s=0.05, min_repeats=3, max_repeats=5, warmups=0, batch_s=0.002, flush_bytes=0)
    timed = timing.time_overhead({"sleep": lambda: timing.time.sleep(0.0005)}, CPU, plan)["sleep"]
    assert 400 < timed.median_us < 5000


def test_cache_sizes_are_read_from_the_system(tmp_path) -> None:
    for index, (kind, size) in enumerate((("Instruction", "900M"), ("Data", "48K"), ("Unified", "32M"))):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        (folder / "type").write_text(kind + "\n")
        (folder / "size").write_text(size + "\n")
    assert last_level_cache_bytes(CPU, tmp_path) == 32 << 20
    assert last_level_cache_bytes(CPU, tmp_path / "nothing") == 64 << 20
    assert parse_size("491520K") == 480 << 20


# --- the correctness gate


@pytest.mark.parametrize(
    ("ours", "expected"),
    [([1.0, 2.2], 0.1), ([1.0, float("nan")], INFINITE), ([1.0, -INFINITE], INFINITE), ([1.0], INFINITE), ([1, 2], 0)],
)
def test_error_is_relative_to_the_largest_entry_and_infinite_for_nonsense(ours, expected) -> None:
    truth = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert check.relative_error((torch.tensor(ours, dtype=torch.float64),), (truth,)) == pytest.approx(expected)


def test_infinities_of_the_truth_must_be_met() -> None:
    truth = torch.tensor([0.5, float("-inf")], dtype=torch.float64)
    assert check.relative_error((truth.float(),), (truth,)) == 0.0
    assert check.relative_error((-truth.float(),), (truth,)) == float("inf")
    assert check.relative_error((torch.zeros(2),), (truth,)) == float("inf")


def test_red_gate_reports_no_speed_and_fails(run_toy, capsys) -> None:
    code, rows = run_toy({"right": right, "wrong": wrong, "absent": ("no such machine",), "crashing": crashing})
    assert code == 1
    good, bad = rows["forward", "right"], rows["forward", "wrong"]
    assert (good.status, good.chosen) == ("ok", True)
    assert good.speedup.eager == pytest.approx(rows["forward", "eager"].timing.median_us / good.timing.median_us)
    assert good.floor.percent > 0
    assert (bad.status, bad.timing, bad.speedup, bad.floor, bad.memory) == ("red", None, None, None, None)
    assert bad.accuracy.error > bad.accuracy.allowed
    assert rows["forward", "absent"].reasons == ("no such machine",)
    assert rows["forward", "crashing"].status == "failed"
    printed = capsys.readouterr().out
    assert "RED" in printed
    assert "no such machine" in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_gradients_are_checked_and_timed_apart(run_toy) -> None:
    modes = ("forward", "backward", "full", "overhead")
    code, rows = run_toy({"right": right, "wrong_gradient": wrong_gradient}, modes=modes, gradients_of=(0,))
    assert code == 1
    assert {mode for mode in modes if rows[mode, "right"].status == "ok"} == set(modes)
    statuses = [rows[mode, "wrong_gradient"].status for mode in modes]
    assert statuses == ["ok", "red", "red", "ok"]
    assert rows["overhead", "right"].floor is None


def test_exit_code_is_zero_where_all_is_well_and_a_missing_compiler_is_a_reason(run_toy) -> None:
    def cannot_compile(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(f"no C++ compiler at {ROOT}/bin")

    code, rows = run_toy({"right": right}, compiled=lambda: cannot_compile)
    assert code == 0
    row = rows["forward", "torch.compile"]
    assert (row.status, row.reasons) == ("unavailable", ("RuntimeError: no C++ compiler at ./bin",))
    _, rows = run_toy({"right": right}, "--no-compile", compiled=lambda: right)
    assert ("forward", "torch.compile") not in rows


def test_working_compiled_rival_gives_a_second_ratio(run_toy) -> None:
    _, rows = run_toy({"right": right}, compiled=lambda: right)
    expected = rows["forward", "torch.compile"].timing.median_us / rows["forward", "right"].timing.median_us
    assert rows["forward", "right"].speedup.compiled == pytest.approx(expected)


def test_inputs_that_a_call_overwrites_are_put_back(run_toy) -> None:
    def overwriting(x: torch.Tensor) -> torch.Tensor:
        result = torch.softmax(x, -1)
        x.zero_()
        return result

    originals: dict[str, torch.Tensor] = {}

    def restore(inputs: Inputs) -> None:
        inputs.args[0].copy_(originals.setdefault("x", inputs.args[0].clone()))

    code, _ = run_toy({"overwriting": overwriting, "right": right})
    assert code == 1, "without restore the next rival works on other inputs"
    code, _ = run_toy({"overwriting": overwriting, "right": right}, restore=restore)
    assert code == 0


def test_parts_and_backend_filter(run_toy) -> None:
    def parts(inputs: Inputs) -> dict[str, Any]:
        return {"inner": lambda: right(*inputs.args), "missing": Unavailable(("not built",))}

    code, rows = run_toy({"torch": right, "triton": wrong}, "--backend", "torch", parts=parts)
    assert code == 0
    assert {name for _, name in rows} == {"eager", "torch", "inner", "missing"}
    assert rows["forward", "inner"].kind == "part"
    assert rows["forward", "missing"].reasons == ("not built",)


def test_a_case_that_breaks_is_a_failed_row(run_toy) -> None:
    code, rows = run_toy({"right": right}, truth=crashing)
    assert code == 1
    assert rows["forward", "case"].reasons == ("RuntimeError: it said it could run",)


def test_a_case_must_be_consistent() -> None:
    with pytest.raises(ValueError, match="gradients_of: expected arguments"):
        toy_case(modes=("full",))
    with pytest.raises(ValueError, match="modes: expected some of"):
        toy_case(modes=("sideways",))


def test_library_says_why_not() -> None:
    report = backend_report("no_such_function", (), {})
    assert report.chosen is None
    assert all("no function no_such_function" in reasons[0] for reasons in report.reasons.values())


# --- files and comparison


def test_rows_survive_a_file(tmp_path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    rows = [row_with(12.5), row_with(None, "red")]
    results.append_rows(path, rows[:1])
    results.append_rows(path, rows[1:])
    assert results.read_rows(path) == rows
    assert results.latest([row_with(1.0), row_with(2.0)]) == {row_with(2.0).key: row_with(2.0)}
    path.write_text('{"schema": 99}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 1: .*expected schema 1, got 99"):
        results.read_rows(path)


@pytest.mark.parametrize(
    ("old", "new", "verdict", "code"),
    [
        ([row_with(10.0)], [row_with(10.9)], "same", 0),
        ([row_with(10.0)], [row_with(11.1)], "slower", 1),
        ([row_with(10.0)], [row_with(5.0)], "faster", 0),
        ([row_with(10.0, implementation="eager")], [row_with(20.0, implementation="eager")], "drifted", 0),
        ([row_with(10.0)], [row_with(None, "red")], "red", 1),
        ([row_with(10.0)], [row_with(None, "failed")], "failed", 1),
        ([row_with(10.0)], [row_with(None, "unavailable")], "vanished", 1),
        ([row_with(10.0)], [], "vanished", 1),
        ([row_with(10.0)], [row_with(10.0, threads=2)], "vanished", 1),
        ([], [row_with(10.0)], "new", 0),
    ],
)
def test_comparison_and_its_exit_code(old, new, verdict, code, tmp_path, capsys) -> None:
    assert compare(old, new, 1.10)[0].verdict == verdict
    paths = [tmp_path / "old.jsonl", tmp_path / "new.jsonl"]
    for path, rows in zip(paths, (old, new), strict=True):
        results.append_rows(path, rows)
    assert run.main(["--compare", *map(str, paths), "--fail-above", "1.10"]) == code
    assert verdict in capsys.readouterr().out


def test_threshold_and_bad_arguments(tmp_path, capsys) -> None:
    assert compare([row_with(10.0)], [row_with(14.0)], 1.5)[0].verdict == "same"
    for arguments, message in (
        (["--compare", "none", "none", "--fail-above", "0.9"], "at least 1, got 0.9"),
        (["--compare", str(tmp_path / "none"), str(tmp_path / "none")], "No such file"),
        (["--case", "nothing"], "--case: expected some of"),
        (["--shape", "games"], "expected NAME=VALUE"),
        (["--threads", "0"], "at least 1"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run.main(arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert run.main([*TINY, "--shape", "rows=-1"]) == 2, "nothing matches"


def test_readme_documents_every_field() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text()

    def names(kind: type) -> set[str]:
        hints = get_type_hints(kind)
        nested = [
            part for hint in hints.values() for part in (hint, *getattr(hint, "__args__", ())) if is_dataclass(part)
        ]
        return {entry.name for entry in fields(kind)}.union(*map(names, nested))

    missing = {name for name in names(results.ResultRow) if f"`{name}`" not in text}
    assert not missing


# --- memory


def test_memory_of_a_known_allocation() -> None:
    mib = 1 << 20

    def call(_: Any) -> torch.Tensor:
        scratch = torch.empty(3 * mib, dtype=torch.uint8)
        scratch.fill_(1)
        del scratch
        return torch.empty(2 * mib, dtype=torch.uint8).fill_(1)

    peak = memory.peak_bytes(timing.Action(lambda: torch.empty(8 * mib, dtype=torch.uint8), call), CPU)
    assert 3 * mib <= peak < 3 * mib + 4096, "the larger of scratch and result; what was prepared does not count"
    both = memory.peak_bytes(
        timing.Action(lambda: None, lambda _: [torch.empty(mib, dtype=torch.uint8) for _ in "ab"]), CPU
    )
    assert 2 * mib <= both < 2 * mib + 4096
    assert memory.peak_of_changes([5, -5, 3, 4, -7]) == 7
    assert memory.peak_of_changes([-5]) == 0


# --- tables, plots, the real cases


def test_times_are_printed_short() -> None:
    assert [report.format_us(time) for time in (0.123, 12.34, 1234.0, 2.5e6)] == [
        "0.12 us",
        "12.3 us",
        "1.23 ms",
        "2.5 s",
    ]


def test_plots_are_drawn(tmp_path) -> None:
    rows = [row_with(float(1 + size), implementation=name, shape=f"n={size}") for size in (1, 2) for name in "ab"]
    wide = [
        replace(row, speedup=results.Speedup(ratio, None)) for row, ratio in zip(rows, (0.01, 1, 3, 9), strict=True)
    ]
    for name, plot_rows in (("linear", rows), ("logarithmic", wide)):
        source, folder = tmp_path / f"{name}.jsonl", tmp_path / name
        results.append_rows(source, plot_rows)
        assert run.main(["--plot", str(source), "--plot-dir", str(folder)]) == 0
        files = sorted(path.name for path in folder.iterdir())
        assert files == [f"{kind}_toy_cpu1.{end}" for kind in ("floor", "speedup") for end in ("png", "svg")]
        assert all(path.stat().st_size > 8000 for path in folder.iterdir())


def test_list_names_every_case(capsys) -> None:
    assert run.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in all_cases())


@pytest.mark.parametrize(
    "headline", [each for each in HEADLINES if each.ours and each.case in all_cases()], ids=lambda each: each.name
)
def test_what_a_headline_calls_ours_is_measured(headline) -> None:
    case, generator = all_cases()[headline.case], torch.Generator("cpu").manual_seed(1)
    inputs = case.make(case.shapes["tiny"][0], CPU, generator)
    names = implementations.collect(case, inputs, headline.mode, (), with_compile=False)
    own = headline.ours
    assert any(name.endswith(own) if own.startswith(",") else name == own for name in names)


@pytest.mark.parametrize("name", all_cases())
def test_real_case_runs_tiny(name, tmp_path, capsys) -> None:
    out = tmp_path / "rows.jsonl"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    code = run.main(["--case", name, "--preset", "tiny", "--device", device, "--no-compile", "--out", str(out)])
    assert code == 0, capsys.readouterr().out
    rows = results.read_rows(out)
    assert {row.key.implementation for row in rows} >= {"eager", "torch", "triton", "cuda", "cpu"}
    for row in rows:
        assert (row.timing is not None) == (row.status == "ok")
        assert row.reasons or row.status == "ok"
    text = out.read_text()
    assert os.uname().nodename not in text, "results travel; the machine's name stays"
    assert str(ROOT) not in text
