"""The runner of the training benchmark: runs tiny, gates on gradients, writes rows of the shared schema."""

from __future__ import annotations

import pytest

pytest.importorskip("accelerate", reason="training needs accelerate")

from benchmarks import train_step
from benchmarks.harness.results import read_rows
from benchmarks.rivals import trl
from tests.support.training import single_thread  # noqa: F401

TINY = ["--preset", "tiny", "--device", "cpu"]


def test_every_rival_has_a_time_or_a_reason(tmp_path, capsys) -> None:
    out = tmp_path / "rows.jsonl"
    assert train_step.main([*TINY, "--out", str(out)]) == 0
    rows = {row.key.implementation: row for row in read_rows(out)}
    for name in (train_step.OURS, train_step.REFERENCE):
        row = rows[name]
        assert row.status == "ok" and row.timing.median_us > 0 and row.memory.peak_bytes > 0
        assert row.accuracy.error < row.accuracy.allowed
        for phase in ("rollout", "judge", "loss", "optimizer"):
            assert rows[f"{name}: {phase}"].kind == "part"
    missing = trl.why_not()
    assert rows[train_step.TRL].status == ("ok" if missing is None else "unavailable")
    assert missing is None or rows[train_step.TRL].reasons == (missing,)
    assert "s an update" in capsys.readouterr().out


def test_a_wrong_gradient_is_red_and_has_no_time(monkeypatch, capsys) -> None:
    monkeypatch.setattr(train_step, "gradient_error", lambda rival: 0.5)
    monkeypatch.setattr(trl, "why_not", lambda: "not today")
    assert train_step.main(TINY) == 1
    assert "gradient off by 0.5" in capsys.readouterr().out
