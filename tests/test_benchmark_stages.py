"""`benchmarks.gpu`: shares of time, separate processes, resuming an interrupted run, and the final table."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from benchmarks import gpu, headlines, run, targets
from benchmarks.cases import all_cases
from benchmarks.harness import machine, results, runner, stages, timing
from benchmarks.harness.results import Floor, ResultRow, RowKey, RunFacts, append_rows, read_rows
from benchmarks.harness.timing import Timing
from benchmarks.one_model import SHAPES as ONE_MODEL
from benchmarks.rollout import SHAPES as ROLLOUTS
from benchmarks.train_step import SHAPES as UPDATES

LOOPS = ("rollout", "train_step", "one_model")
ROOT = Path(__file__).resolve().parent.parent
FACTS = RunFacts("2026-01-02T00:00:00+00:00", "standard", "c0ffee1", False, {"gpu": "a card", "cpu": "c"},
                 {"torch": "2"}, {"copy_bytes_per_s": targets.H200_COPY_BYTES_PER_S / 2})  # fmt: skip


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


def outcomes_of(*stage_list: stages.Stage, seconds: float = 60, finished=(), log: Path) -> dict[str, stages.Outcome]:
    before = {name: stages.Outcome("ok", 1.0) for name in finished}
    return stages.run_stages(stage_list, seconds, log, before, lambda stage, outcome: None)


# ---- stages ----------------------------------------------------------------------------------------------------------


def test_every_command_runs_and_a_failure_costs_only_itself(tmp_path) -> None:
    log = tmp_path / "log"
    mark = f"open({str(tmp_path / 'ran')!r}, 'a').write('x')"
    failing = python("print('reading'); raise SystemExit('the disk is full')")
    outcomes = outcomes_of(
        stages.Stage("first", 1, (failing, python(mark))),
        stages.Stage("absent", 1, (python(mark),), missing="no such card"),
        stages.Stage("before", 1, (python(mark),)),
        stages.Stage("second", 1, (python(f"import os; os.environ['WHERE']; {mark}"),), {"WHERE": "here"}),
        finished=("before",), log=log,
    )  # fmt: skip
    assert [each.status for each in outcomes.values()] == ["failed", "unavailable", "done", "ok"]
    assert (tmp_path / "ran").read_text() == "xx"
    assert outcomes["first"].reasons[0].endswith("(1 of 2): exit code 1: the disk is full")
    assert outcomes["absent"].reasons == ("no such card",)
    assert "reading" in log.read_text()


def test_a_stage_ends_with_its_share_and_all_that_it_started(tmp_path) -> None:
    child = f"import time, os; open({str(tmp_path / 'child')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    start = time.monotonic()
    outcomes = outcomes_of(
        stages.Stage("slow", 1, (python(parent),)), stages.Stage("quick", 1, (python("pass"),)),
        seconds=6, log=tmp_path / "log",
    )  # fmt: skip
    assert (
        outcomes["slow"].status == "failed" and "ended after 3 s, its share of the time" in outcomes["slow"].reasons[0]
    )
    assert outcomes["quick"].status == "ok" and time.monotonic() - start < 15
    number = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{number}").exists() and "zombie" not in Path(f"/proc/{number}/status").read_text():
        assert time.monotonic() < deadline, "the child goes on"
        time.sleep(0.1)


def test_time_that_is_left_goes_to_those_after(tmp_path, monkeypatch) -> None:
    budgets: list[float] = []
    monkeypatch.setattr(
        stages, "run_stage", lambda stage, seconds, log: budgets.append(seconds) or stages.Outcome("ok")
    )
    shares = {"a": 1, "b": 1, "done": 5, "absent": 5, "c": 2}
    stage_list = [stages.Stage(name, share, missing="no" if name == "absent" else "") for name, share in shares.items()]
    outcomes_of(*stage_list, seconds=100, finished=("done",), log=tmp_path / "log")
    assert budgets == pytest.approx([25, 100 / 3, 100], abs=0.5)


def test_without_time_nothing_is_started(tmp_path) -> None:
    outcomes = outcomes_of(stages.Stage("late", 1, (python("raise SystemExit(1)"),)), seconds=-1, log=tmp_path / "log")
    assert outcomes["late"].reasons[0].endswith("no time left")


def test_a_stage_too_short_for_its_commands_leaves_its_time(tmp_path) -> None:
    mark = python(f"open({str(tmp_path / 'ran')!r}, 'a').write('x')")
    outcomes = outcomes_of(stages.Stage("long", 1, (mark,), least=90), stages.Stage("last", 1, (mark,)),
                           seconds=60, log=tmp_path / "log")  # fmt: skip
    assert outcomes["long"].reasons == (f"{Path(sys.executable).name}: expected at least 90 s; 30 s were left",)
    assert outcomes["last"].status == "ok" and (tmp_path / "ran").read_text() == "x"


def test_commands_leave_the_least_time_to_those_after_them(tmp_path, monkeypatch) -> None:
    limits: list[float] = []
    monkeypatch.setattr(stages, "run_command", lambda command, seconds, *_: limits.append(seconds) or "")
    for least, seconds in ((10, 100), (0, 100), (40, 90), (40, 30)):
        stages.run_stage(stages.Stage("three", 1, (("a",), ("b",), ("c",)), least=least), seconds, None)
    assert limits == pytest.approx([80, 90, 100, 100, 100, 100, 40, 50, 90], abs=0.5)


#: Seconds that the commands of a stage were seen or estimated to take.
NEEDS = {"build": (50, 5), "tests": (105,), "headlines": (90,), "rollout": (70, 70), "train_step": (35, 55),
         "one_model": (50,)}  # fmt: skip
FIRST = ("build", "tests", "headlines", "rollout", "train_step")


@pytest.mark.parametrize(
    ("seconds", "chosen", "enough"),
    [
        (540, (*NEEDS, "sanitizers", "plans", "sweeps", "growth"), FIRST),
        (285, ("build", "headlines", "rollout"), ("build", "headlines", "rollout")),
        (285, ("tests", "train_step", "one_model"), ("tests", "train_step", "one_model")),
        (240, (*NEEDS, "sanitizers", "plans", "sweeps", "growth"), ("build",)),
    ],
)
def test_stages_have_what_their_commands_need(seconds, chosen, enough, tmp_path, monkeypatch) -> None:
    now, ended, running = [0.0], [], [""]

    def run_command(command, limit, *_):
        needed = NEEDS.get(running[0], ())
        takes = needed[min(len(ended), len(needed) - 1)] if needed else limit
        now[0] += min(takes, limit)
        ended.append(limit >= takes)
        return ""

    def tell(stage, outcome):
        completed[stage.name] = len(ended) == len(stage.commands) and all(ended)

    real = stages.run_stage

    def run_stage(stage, *arguments):
        running[0] = stage.name
        ended.clear()
        return real(stage, *arguments)

    completed: dict[str, bool] = {}
    monkeypatch.setattr(stages, "run_command", run_command)
    monkeypatch.setattr(stages, "run_stage", run_stage)
    monkeypatch.setattr(stages.time, "monotonic", lambda: now[0])
    made = gpu.make_stages(torch.device("cpu"), "standard", tmp_path / "rows.jsonl")
    wanted = [replace(stage, missing="") for stage in made if stage.name in chosen]
    stages.run_stages(wanted, seconds, tmp_path / "log", {}, tell)
    assert all(completed[name] for name in enough), completed


def test_a_program_that_is_not_there_costs_its_own_command(tmp_path) -> None:
    stage = stages.Stage("one", 1, (("/no/such/program",), python("pass")))
    outcome = outcomes_of(stage, log=tmp_path / "log")["one"]
    assert len(outcome.reasons) == 1 and outcome.reasons[0].startswith("program (1 of 2): FileNotFoundError: ")


# ---- failures --------------------------------------------------------------------------------------------------------


def test_a_failed_test_is_told_before_the_tests_end(tmp_path) -> None:
    """Tests that outlast their share of the time are killed, without a summary."""
    tests, log = tmp_path / "test_two.py", tmp_path / "log"
    killed = "def test_killed(): os.kill(os.getpid(), 9)\n"
    tests.write_text(f"import os\ndef test_wrong(): assert 1 == 2, 'no'\n{killed}")
    command = (*gpu.PYTEST, "-p", "tests.conftest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tests))
    with log.open("wb") as file:
        file.write(b"failed: an earlier run's\n")
    begin = log.stat().st_size
    with log.open("ab") as file:
        assert stages.run_command(command, 60.0, {}, file).startswith("exit code -9")
    (line,) = gpu.failures(log, begin)
    assert line == "failed: test_two.py::test_wrong (call): AssertionError: no assert 1 == 2"
    assert "def test_wrong" in log.read_text()


def test_a_test_file_that_does_not_import_is_told(tmp_path) -> None:
    (tmp_path / "test_gone.py").write_text("import no_such_module\n")
    command = (*gpu.PYTEST, "-p", "tests.conftest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path))
    with (tmp_path / "log").open("wb") as file:
        assert stages.run_command(command, 60.0, {}, file).startswith("exit code 2")
    (line,) = gpu.failures(tmp_path / "log", 0)
    assert line.startswith("failed: test_gone.py (collection): ") and "No module named 'no_such_module'" in line


def test_stages_that_all_die_cost_nothing_but_themselves(tmp_path, monkeypatch, capsys) -> None:
    """Every stage of a GPU's run dies in another way; the run reports each, and a second run tries each again."""
    ways = ("raise SystemExit('no memory')", "import os; os.kill(os.getpid(), 9)", "import os; os.abort()")
    real = gpu.make_stages(torch.device("cpu"), "standard", tmp_path / "rows.jsonl")
    dying = [
        replace(stage, commands=tuple(python(ways[index % 3]) for _ in stage.commands), missing="", least=0.0)
        for index, stage in enumerate(real)
    ]
    monkeypatch.setattr(gpu, "make_stages", lambda *_: dying)
    command = ["--device", "cpu", "--out", str(tmp_path / "rows.jsonl"), "--minutes", "2", "--commit", "c0ffee1"]
    for runs in (1, 2):
        assert gpu.main(command) == 1
        rows = read_rows(tmp_path / "rows.jsonl")
        assert [row.key.implementation for row in rows] == [stage.name for stage in real] * runs
        assert all(row.status == "failed" and len(row.reasons) == len(stage.commands)
                   for row, stage in zip(rows, dying * runs, strict=True))  # fmt: skip
        printed = re.findall(r"failed \d+ s: ", capsys.readouterr().out)
        assert len(printed) == 2 * len(real), "when it ends, and in the table"


def test_a_module_that_was_left_out_is_a_failed_build() -> None:
    """setup.py ends without an error where it leaves a module out."""
    absent = "import sys; sys.modules['nlhf_kernels._cuda'] = None\n"
    result = subprocess.run([*python(absent + gpu.CHECK_BUILD)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.startswith("the native module _cuda is missing: ")


# ---- resuming --------------------------------------------------------------------------------------------------------


@pytest.fixture
def committed(monkeypatch) -> dict[str, tuple]:
    """Replace the source state by a settable one: a commit, and whether the tree differs."""
    state = {"is": ("c0ffee1", False)}
    monkeypatch.setattr(runner, "source_state", lambda: state["is"])
    return state


def test_what_a_commit_has_is_not_run_again(committed, tmp_path, monkeypatch, capsys) -> None:
    counter, out = tmp_path / "count", tmp_path / "rows.jsonl"
    stage_list = [
        stages.Stage("good", 1, (python(f"open({str(counter)!r}, 'a').write('g')"),)),
        stages.Stage("bad", 1, (python(f"open({str(counter)!r}, 'a').write('b'); raise SystemExit(3)"),)),
    ]
    monkeypatch.setattr(gpu, "make_stages", lambda *_: stage_list)
    command = ["--device", "cpu", "--out", str(out), "--minutes", "0.5"]
    assert gpu.main(command) == 1 and counter.read_text() == "gb"
    assert gpu.main(command) == 1 and counter.read_text() == "gbb", "what failed is tried again"
    assert "good        done" in capsys.readouterr().out
    for state in (("c0ffee2", False), ("c0ffee1", True), (None, None)):
        committed["is"] = state
        before = counter.read_text()
        gpu.main([*command, "--stages", "good"])
        assert counter.read_text() == before + "g", f"{state} is other code, or unknown code"
    assert [row.key.implementation for row in read_rows(out)][:3] == ["good", "bad", "bad"]


def test_a_benchmark_leaves_out_what_it_has_measured(committed, tmp_path, capsys) -> None:
    out = tmp_path / "rows.jsonl"
    command = ["--case", "mirror_descent", "--preset", "tiny", "--device", "cpu", "--no-compile", "--resume"]
    command += ["--out", str(out)]
    assert run.main([*command, "--shape", "dtype=float32"]) == 0
    first = read_rows(out)
    assert run.main(command) == 0
    second = read_rows(out)[len(first) :]
    assert second and {row.key.dtype for row in second} == {"float64"}
    assert run.main(command) == 0 and len(read_rows(out)) == len(first) + len(second)
    assert "everything has been measured" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run.main(["--resume"])


def test_another_process_goes_on_where_the_gpu_takes_no_more_work(committed, tmp_path, monkeypatch) -> None:
    """An illegal access ends all work of a process on the GPU; its rows say so, and those after it are not lost."""
    new_process = Mock(side_effect=SystemExit)
    monkeypatch.setattr(timing, "synchronise", Mock(side_effect=RuntimeError("CUDA error: an illegal memory access")))
    monkeypatch.setattr(run.os, "execv", new_process)
    command = ["--case", "mirror_descent", "--preset", "tiny", "--device", "cpu", "--no-compile", "--backend", "torch"]
    out = tmp_path / "rows.jsonl"
    with pytest.raises(SystemExit):
        run.main([*command, "--resume", "--out", str(out)])
    new_process.assert_called_once_with(sys.executable, sys.orig_argv)
    assert len({row.key.dtype for row in read_rows(out)}) == 1, "the second shape is left to the next process"
    assert run.main(command) == 1, "nothing says where to go on"


def test_a_copy_without_git_is_told_its_commit(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.delenv(machine.COMMIT_VARIABLE, raising=False)
    assert machine.source_state() == (None, None)
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "c0ffee1")
    assert machine.source_state() == ("c0ffee1", None)


# ---- targets ---------------------------------------------------------------------------------------------------------


def test_every_headline_is_a_shape_that_a_benchmark_measures() -> None:
    standard = {(name, *shape.identity): case.modes_at(shape)
                for name, case in all_cases().items() for shape in case.shapes["standard"]}  # fmt: skip
    standard |= {("rollout", *shape.identity): ("forward",) for shape in ROLLOUTS["standard"]}
    for name, shapes in (("train_step", UPDATES), ("one_model", ONE_MODEL)):
        standard |= {(name, *shape.identity): ("full",) for shape in shapes["standard"]}
    for key, modes in targets.headline_modes().items():
        assert set(modes) <= set(standard.get(key, ())), key
    assert {key[0] for key in targets.headline_modes()} == {*all_cases(), *LOOPS}, "every case"
    names = [headline.name for headline in targets.HEADLINES]
    assert len(set(names)) == len(names)
    assert {each.target.of for each in targets.HEADLINES if each.target and each.target.of} <= set(names)
    assert len(ROLLOUTS["headline"]) == 2 and len(UPDATES["headline"]) == len(ONE_MODEL["headline"]) == 2


def test_the_headline_preset_is_made_of_them() -> None:
    settings = runner.Settings(torch.device("cuda"), "headline")
    jobs = runner.select_jobs(list(all_cases().values()), settings, targets.headline_modes())
    modes_by_shape = {(job.case.name, *job.shape.identity): job.case.modes_at(job.shape) for job in jobs}
    assert modes_by_shape == {key: modes for key, modes in targets.headline_modes().items() if key[0] in all_cases()}
    aimed_at = {(each.case, each.shape, each.dtype) for each in targets.HEADLINES if each.target is not None}
    has_target = [(job.case.name, *job.shape.identity) in aimed_at for job in jobs]
    assert has_target == sorted(has_target, reverse=True), "what has a target first: the time may end before the rest"
    assert jobs[0].case.name == targets.HEADLINES[0].case


def row(headline: targets.Headline, implementation: str, us: float, kind: str = "backend", **more) -> ResultRow:
    key = RowKey(headline.case, headline.shape, headline.dtype, headline.mode, implementation, "cuda", 8)
    floor = Floor(1.0, 0.0, us / 2, more.pop("bound_by", "bandwidth"), more.pop("percent", 50.0))
    timing = Timing(us, us, us, 3, "cold", 1)
    return replace(ResultRow(key, kind, "ok", FACTS, timing=timing, floor=floor), **more)


def table_row(rows: list[ResultRow], headline: targets.Headline) -> str:
    others = [each for each in targets.HEADLINES if each.name != headline.name]
    lines = targets.table(rows, [headline, *others])
    return lines[1]


def test_a_line_says_ours_the_best_rival_and_whether_the_target_is_met() -> None:
    one = targets.HEADLINES[0]
    assert one.target == targets.Target("us", 6)
    rows = [
        row(one, "cuda", 11.0, chosen=True),
        row(one, "triton", 8.0),
        row(one, "eager", 200.0, "baseline"),
        row(one, "torch.compile", 100.0, "compiled"),
        row(one, "flashinfer, pre-mixed", 1.0, "part"),
    ]
    line = table_row(rows, one)
    assert re.split(r"\s{2,}", line)[:2] == ["sample 1 x 128256", "11 us cuda"]
    assert "100 us torch.compile" in line and "9.09x" in line and "50 %" in line
    assert " 12 us " in line and line.endswith("yes (triton: 8 us)"), "half an H200's bandwidth, twice its time"
    assert "NO" in table_row([row(one, "cuda", 13.0, chosen=True)], one)
    assert "NO" in table_row([row(one, "cuda", 7.0, chosen=True, bound_by="matmul")], one), "products do not scale"
    assert re.split(r"\s{2,}", table_row([], one))[1:3] == ["-", "-"]


def test_targets_that_are_ratios() -> None:
    by_kind = {each.target.kind: each for each in reversed(targets.HEADLINES) if each.target is not None}
    by_kind["times"] = next(  # of the implementation that is chosen, not of a variant
        each for each in targets.HEADLINES if each.target is not None and each.target.kind == "times" and not each.ours
    )
    base = next(each for each in targets.HEADLINES if each.name == by_kind["times"].target.of)
    value = by_kind["times"].target.value
    for us, verdict in ((100 * value - 1, "yes"), (100 * value + 1, "NO")):
        rows = [row(base, "cuda", 100.0, chosen=True), row(by_kind["times"], "cuda", us, chosen=True)]
        assert table_row(rows, by_kind["times"]).endswith(verdict)
    for share, verdict in ((96.0, "yes"), (90.0, "NO")):
        rows = [row(by_kind["floor"], "triton", 5.0, chosen=True, percent=share)]
        assert table_row(rows, by_kind["floor"]).endswith(verdict)
    faster = 50 * by_kind["faster"].target.value
    for kind, good, bad in (("faster", faster + 1, faster - 1), ("memory", 100, 30)):
        each = by_kind[kind]
        for size, verdict in ((good, "yes"), (bad, "NO")):
            ours = row(each, each.ours or "cuda", 50.0, chosen=True, memory=results.Memory(40, "counted"))
            rival = row(each, "TRL 1.13.0", size, "baseline", memory=results.Memory(int(size), "counted"))
            assert table_row([ours, rival], each).endswith(verdict), kind


def test_what_has_no_time_has_a_reason() -> None:
    by_kind = {each.target.kind: each for each in reversed(targets.HEADLINES) if each.target is not None}
    one, faster = targets.HEADLINES[0], by_kind["faster"]
    red = row(one, "cuda", 5.0, chosen=True, timing=None, status="red", reasons=("error 1, allowed 0.1",))
    assert table_row([red], one).endswith("- red: error 1, allowed 0.1")
    broken = replace(red, key=replace(red.key, implementation="case"), kind="case", chosen=False, status="failed")
    assert table_row([broken], one).endswith("- failed: error 1, allowed 0.1")
    ours = row(faster, faster.ours, 5.0, chosen=True)
    absent = row(faster, "rival", 5.0, "baseline", timing=None, status="unavailable", reasons=("not installed",))
    assert table_row([ours, absent], faster).endswith("- unavailable: not installed")
    assert max(map(len, targets.table([replace(red, reasons=("x" * 999,))]))) == targets.WIDTH


def test_an_update_shows_its_phases() -> None:
    updates = [each for each in targets.HEADLINES if each.case == "train_step"]
    one, other = updates[:2]
    parts = [row(one, f"NashTrainer: {name}", us, "part") for name, us in (("rollout", 3e5), ("backward", 1e5))]
    rows = [row(one, "NashTrainer", 4e5, chosen=True), *parts, row(one, "TRL 1.13.0: rollout", 9e5, "part")]
    rows.append(row(other, "NashTrainer: rollout", 7e5, "part"))
    expected = "an update of training, 64 new tokens: rollout 300 ms (75 %), backward 100 ms (25 %)"
    assert targets.phase_lines(rows, [one]) == [expected]
    assert targets.phase_lines(rows)[0].endswith(expected.partition(": ")[2]) and len(targets.phase_lines(rows)) == 1


def test_the_readmes_first_tables_are_the_gpus(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(headlines, "RESULTS", tmp_path)
    assert headlines.gpu_tables() == []
    one = targets.HEADLINES[0]
    append_rows(tmp_path / "a-card.jsonl", [row(one, "cuda", 11.0, chosen=True), row(one, "eager", 200.0, "baseline")])
    append_rows(
        tmp_path / "cpu.jsonl", [replace(row(one, "cpu", 9.0), key=replace(row(one, "cpu", 9.0).key, device="cpu"))]
    )
    (table,) = headlines.gpu_tables()
    assert "| sample 1 x 128256 | 11 us cuda | 200 us eager | 18.2x | 50 % | 12 us | yes |" in table
    assert table.endswith("Medians on a card, torch 2, at c0ffee1: `benchmarks/results/a-card.jsonl`.")


def test_rivals_of_another_run_say_nothing() -> None:
    one = targets.HEADLINES[0]
    old = replace(FACTS, timestamp="2026-01-01T00:00:00+00:00")
    rows = [row(one, "eager", 50.0, "baseline", run=old), row(one, "cuda", 99.0, chosen=True, run=old),
            row(one, "cuda", 5.0, chosen=True)]  # fmt: skip
    assert re.split(r"\s{2,}", table_row(rows, one))[1:4] == ["5 us cuda", "-", "-"]


def test_the_end_fits_sixty_lines(tmp_path) -> None:
    stage_list = gpu.make_stages(torch.device("cpu"), "standard", tmp_path / "rows.jsonl")
    ends = {stage.name: stages.Outcome("failed", 1.0, ("because",)) for stage in stage_list}
    facts = replace(FACTS, machine={"gpu": "a card", "cpu": "c"})
    lines = gpu.closing_lines([], ends, facts, tmp_path / "log")
    assert len(lines) <= gpu.MAX_LINES
    updates = 2  # a line of phases each, once they have been measured
    with_target = [each.name for each in targets.HEADLINES if each.target is not None]
    assert len(with_target) + 1 + updates + len(ends) + 1 <= gpu.MAX_LINES, "no target is left out"
    kept = [each.name for each in targets.fitting(targets.HEADLINES, len(with_target) + 2)]
    without = [each.name for each in targets.HEADLINES if each.target is None]
    assert kept == [each.name for each in targets.HEADLINES if each.name in (*with_target, *without[:2])]
    assert targets.fitting(targets.HEADLINES, 999) == list(targets.HEADLINES)
    many = [row(replace(targets.HEADLINES[0], shape=f"n={n}"), "cuda", 1.0, chosen=True) for n in range(99)]
    many = [replace(each, run=replace(FACTS, preset="tiny")) for each in many]
    assert len(gpu.closing_lines(many, ends, replace(facts, preset="tiny"), tmp_path / "log")) == gpu.MAX_LINES


# ---- all stages ------------------------------------------------------------------------------------------------------


def test_all_of_it_runs_tiny_on_a_cpu(tmp_path) -> None:
    """No stage fails on the preset tiny; the test takes a minute, since each command is a separate process."""
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "benchmarks.gpu", "--preset", "tiny", "--device", "cpu", "--out", str(out)]
    command += ["--minutes", "9", "--commit", "c0ffee1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stdout + process.stderr + out.with_suffix(".log").read_text()
    rows = read_rows(out)
    assert {row.key.case for row in rows} == {"gpu", "mirror_descent", *LOOPS}
    ends = {row.key.implementation: row for row in rows if row.kind == "stage"}
    assert {name: end.status for name, end in ends.items()} == {
        "build": "unavailable", "tests": "ok", "headlines": "ok", "rollout": "ok", "train_step": "ok",
        "one_model": "ok", "sanitizers": "unavailable", "plans": "unavailable", "sweeps": "unavailable",
        "growth": "unavailable",
    }  # fmt: skip
    assert all(json.loads(line) for line in out.read_text().splitlines())
    lines = process.stdout.splitlines()
    assert len(lines[lines.index("") + 1 :]) <= gpu.MAX_LINES
    table = "\n".join(lines)
    assert re.search("^mirror_descent forward float32.* eager ", table, re.MULTILINE), table
    assert re.search("^train_step full float32.*: rollout .*, backward .*%\\)", table, re.MULTILINE), table
    assert str(tmp_path) not in out.read_text()
    assert not re.search(rf"\b{re.escape(os.uname().nodename)}\b", out.read_text()), (
        "a whole word: vm is part of tvm_ffi"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes: expected a number of minutes above 0; got '0'"),
        (["--minutes", "ten"], "expected a number of minutes above 0; got 'ten'"),
        (["--commit", "main"], "--commit: expected 7 to 40 hexadecimal digits; got 'main'"),
        (["--stages", "benches"], "--stages: expected some of build, tests, headlines"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--device", "cpu", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_missing_gpu_is_said(capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cuda"])
    assert "--device: expected cpu, for PyTorch sees no GPU here; got cuda" in capsys.readouterr().err


def test_stages_are_no_part_of_a_comparison(tmp_path, capsys) -> None:
    """A stage that took longer is not reported as a slower row."""
    stage = gpu.stage_row(stages.Stage("tests", 1), stages.Outcome("ok", 1.0), FACTS, torch.device("cpu"))
    slower = replace(stage, timing=replace(stage.timing, median_us=9e9))
    paths = [tmp_path / "old.jsonl", tmp_path / "new.jsonl"]
    for path, each in zip(paths, (stage, slower), strict=True):
        append_rows(path, [each])
    assert run.main(["--compare", *map(str, paths)]) == 0
    assert "0 rows compared" in capsys.readouterr().out
