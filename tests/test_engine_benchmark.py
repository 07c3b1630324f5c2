"""The runner of the rollout benchmark: runs tiny, gates on log-probabilities, writes rows of the shared schema."""

from __future__ import annotations

from benchmarks import rollout
from benchmarks.harness.results import read_rows
from tests.support.tiny_models import one_thread


def test_every_rival_has_a_time(tmp_path, capsys) -> None:
    out = tmp_path / "rows.jsonl"
    with one_thread():
        assert rollout.main(["--preset", "tiny", "--device", "cpu", "--out", str(out)]) == 0
    rows = read_rows(out)
    assert [row.key.implementation for row in rows][:3] == ["engine", "engine, sdpa", "eager"] and len(rows) == 6
    assert all(row.timing is not None and row.speedup is not None for row in rows)
    assert rows[0].accuracy.error < rows[0].accuracy.allowed
    assert "tokens/s" in capsys.readouterr().out


def test_wrong_logprobs_are_red_and_have_no_time(monkeypatch, capsys) -> None:
    monkeypatch.setattr(rollout, "largest_error", lambda pair, result: 9.0)
    with one_thread():
        assert rollout.main(["--preset", "tiny", "--device", "cpu"]) == 1
    assert "log-probabilities off by 9" in capsys.readouterr().out
