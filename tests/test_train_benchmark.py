"""The training benchmark: a tiny run, the gate on gradients, rows of the shared schema."""

from __future__ import annotations

import importlib.util
from functools import partial

import pytest
import torch

pytest.importorskip("accelerate", reason="training needs accelerate")

from benchmarks import train_step
from benchmarks.harness.case import Shape
from benchmarks.harness.processes import Remote, RemoteError
from benchmarks.harness.results import ResultRow, Speedup, read_rows
from benchmarks.harness.runner import Settings, open_run
from benchmarks.harness.timing import TimingPlan
from tests.support import rivals
from tests.support.training import single_thread  # noqa: F401

PHASES = ("rollout", "judge", "loss", "backward", "optimizer", "other")
TINY = ["--preset", "tiny", "--device", "cpu"]


def test_every_rival_has_a_time_or_a_reason(tmp_path, capsys) -> None:
    out = tmp_path / "rows.jsonl"
    assert train_step.main([*TINY, "--out", str(out)]) == 0
    rows = {row.key.implementation: row for row in read_rows(out)}
    for name in (train_step.OURS, train_step.TORCH):
        row = rows[name]
        assert row.status == "ok" and row.timing.median_us > 0 and row.memory.peak_bytes > 0
        assert row.accuracy.error < row.accuracy.allowed
        phases = [rows[f"{name}: {phase}"] for phase in PHASES]
        assert {phase.kind for phase in phases} == {"part"}
        seconds = [phase.timing.median_us for phase in phases]
        assert min(seconds) >= 0 and sum(seconds) <= row.timing.median_us, "of this update alone"
    theirs = rows[train_step.TRL]
    if importlib.util.find_spec("trl") is None:
        assert theirs.status == "unavailable" and theirs.reasons == ("ImportError: expected TRL 1.13; found none",)
    else:
        assert theirs.status == "ok" and theirs.timing.median_us > 0 and rows[f"{theirs.key.implementation}: rollout"]
    assert "s an update" in capsys.readouterr().out


def test_a_rival_that_fails_costs_its_own_row(monkeypatch) -> None:
    expected = {
        "wrong": ("red", "gradient off by 0.5"),
        "nan": ("red", "gradient off by nan"),
        "killed": ("failed", "its process ended with SIGKILL"),
        "assert": ("failed", "RuntimeError: CUDA error: device-side assert triggered and more"),
        "weights": ("failed", "FloatingPointError: after 3 updates lm_head.weight is not finite"),
        "absent": ("failed", "ModuleNotFoundError: No module named 'requests'"),
        train_step.TRL: ("unavailable", "ModuleNotFoundError: No module named 'requests'"),
    }
    faults = {train_step.OURS: "", **{name: name for name in expected}, train_step.TRL: "absent"}
    monkeypatch.setattr(train_step, "MAKERS", {name: partial(rivals.make, fault) for name, fault in faults.items()})
    monkeypatch.setattr(train_step, "start", rivals.start)
    context = open_run(Settings(torch.device("cpu"), "tiny"), [])
    plan = TimingPlan(budget_s=0.0, min_repeats=2, max_repeats=2, warmups=1, batch_s=0.0, flush_bytes=0)
    ours, part, *others = train_step.run_shape(train_step.SHAPES["tiny"][0], context, plan)
    assert ours.status == "ok" and ours.timing.repeats == 2 and ours.speedup == Speedup(None, None)
    assert part.key.implementation == f"{train_step.OURS}: loss" and part.timing.median_us == pytest.approx(1000)
    assert {row.key.implementation: (row.status, *row.reasons) for row in others} == expected
    assert all(row.timing is None and row.memory is None for row in others)
    assert [ResultRow.from_json(row.to_json()) for row in others] == others, "NaN is no JSON"


def test_an_object_in_another_process_answers_until_it_ends() -> None:
    with Remote(rivals.make, "killed") as remote:
        remote.wait()
        assert remote.call("finished", 2) == {"loss": [1e-3, 1e-3]} and remote.call("run") is None
        with pytest.raises(RemoteError, match="AttributeError: 'Rival' object has no attribute 'walk'") as caught:
            remote.call("walk")
        assert "Exception" in caught.value.kinds
        for _ in range(2):
            with pytest.raises(RemoteError, match="its process ended with SIGKILL"):
                remote.call("run")


def test_bfloat16_is_autocast_around_float32_weights(tmp_path) -> None:
    sizes = {"prompts": 4, "prompt": 16, "new": 8, "width": 64, "layers": 2, "vocabulary": 1000}
    rival = train_step.nash_rival(str(tmp_path), Shape(sizes, "bfloat16"), torch.device("cpu"), None)
    assert {value.dtype for value in rival.trainer.model.parameters()} == {torch.float32}
    assert rival.trainer.rollout_policy.dtype == torch.bfloat16
    assert train_step.gradient_error(rival) < train_step.ALLOWED_ERROR["bfloat16"]
    for _ in range(4):
        rival.run()
    phases = rival.finished(3)
    assert set(phases) == set(PHASES) and all(seconds > 0 for name in PHASES for seconds in phases[name])
    whole = [sum(seconds) for seconds in zip(*phases.values(), strict=True)]
    other = min(rest / total for rest, total in zip(phases["other"], whole, strict=True))
    assert other < 0.05, "every part of an update has its name"
    next(rival.trainer.model.parameters()).data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="after 5 updates model.embed_tokens.weight is not finite"):
        rival.finished(1)
