"""`benchmarks.scaling`: its layouts, its gate, and one launch of each layout of two processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks import scaling
from benchmarks.harness.case import Shape
from benchmarks.harness.results import RunFacts, read_rows
from benchmarks.harness.timing import summarise
from benchmarks.scaling import ALONE, Layout, Outcome
from nlhf_kernels.core.upstream import distributed_config_class

FACTS = RunFacts("2026-01-01T00:00:00+00:00", "tiny", None, None, {}, {}, {})
CONTEXT = SimpleNamespace(settings=SimpleNamespace(device=torch.device("cpu")), facts=FACTS, threads=1)


def rows_of(**outcomes: Outcome) -> dict:
    layouts = {"alone": Layout(), "tp": Layout(tp_size=2)}
    shape = Shape({"prompts": 2})
    alone = outcomes["alone"]
    return {name: scaling._row(layouts[name], outcome, alone, shape, CONTEXT) for name, outcome in outcomes.items()}


def timed(us: float, loss: float = 1.0) -> Outcome:
    return Outcome(summarise([us], 0), [loss, 2.0])


def test_layouts_have_the_processes_they_are_for() -> None:
    for count in (1, 2, 4, 8):
        layouts = scaling.layouts_of(count)
        assert {layout.processes for layout in layouts} == {count}
        assert len(set(map(str, layouts))) == len(layouts)
        assert {scaling._processes(str(layout)) for layout in layouts} == {count}
    assert str(Layout()) == ALONE and str(Layout(2, 2)) == "tp=2 fsdp=2"
    assert (Layout(2, 2, 2).groups, Layout(tp_size=8).groups) == (4, 1)


def test_the_speedup_is_over_one_process() -> None:
    rows = rows_of(alone=timed(100.0), tp=timed(50.0))
    assert (rows["alone"].speedup.eager, rows["tp"].speedup.eager) == (1.0, 2.0)
    assert rows["tp"].accuracy.error == 0.0


def test_a_layout_that_learns_something_else_has_no_time() -> None:
    row = rows_of(alone=timed(100.0), tp=timed(1.0, loss=1.01))["tp"]
    assert (row.status, row.timing, row.speedup) == ("red", None, None)
    assert row.accuracy.error == pytest.approx(0.01)
    row = rows_of(alone=timed(100.0), tp=timed(1.0, loss=float("nan")))["tp"]
    assert (row.status, row.accuracy.error) == ("red", None)


def test_a_launch_that_dies_costs_its_row() -> None:
    rows = rows_of(alone=timed(100.0), tp=Outcome(reason="exit code 1: ValueError: no"))
    assert (rows["tp"].status, rows["tp"].reasons) == ("failed", ("exit code 1: ValueError: no",))
    assert rows["alone"].status == "ok"


@pytest.mark.skipif(distributed_config_class() is None, reason="transformers is too old for split models")
def test_it_runs_tiny(tmp_path, capsys) -> None:
    out = tmp_path / "rows.jsonl"
    command = ["--preset", "tiny", "--device", "cpu", "--threads", "1", "--processes", "2", "--out", str(out)]
    assert scaling.main(command) == 0, capsys.readouterr().out
    rows = {row.key.implementation: row for row in read_rows(out)}
    assert list(rows) == [ALONE, "ddp=2", "fsdp=2", "tp=2"]
    assert all(row.status == "ok" and row.accuracy.error <= row.accuracy.allowed for row in rows.values())
    assert "% of 2" in capsys.readouterr().out


def test_bad_processes_are_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        scaling.main(["--device", "cpu", "--processes", "3"])
    assert "--processes: expected 1, 2, 4 or 8" in capsys.readouterr().err
