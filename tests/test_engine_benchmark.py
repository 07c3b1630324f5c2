"""The rollout benchmark: a tiny run, the gate on log-probabilities, rows of the shared schema."""

from __future__ import annotations

import pytest
import torch

from benchmarks import rollout
from benchmarks.harness import runner
from benchmarks.harness.case import Shape
from benchmarks.harness.results import read_rows
from benchmarks.targets import HEADLINES
from tests.support.tiny_models import one_thread


def test_every_rival_has_a_time(tmp_path, capsys) -> None:
    out = tmp_path / "rows.jsonl"
    with one_thread():
        assert rollout.main(["--preset", "tiny", "--device", "cpu", "--out", str(out)]) == 0
    every = read_rows(out)
    rows = [row for row in every if row.kind != "part"]
    two_models = ["engine", rollout.SDPA, rollout.PRODUCTS, rollout.ONE_PASS, *rollout.RIVALS]
    assert [row.key.implementation for row in rows] == [*two_models, rollout.LORA]
    assert all(row.timing is not None for row in rows) and all(row.speedup is not None for row in rows[:-1])
    assert rows[-1].accuracy.error < rows[-1].accuracy.allowed
    assert rows[-1].floor.bytes < rows[0].floor.bytes, "weights of the base are read once for both"
    assert rows[0].accuracy.error < rows[0].accuracy.allowed
    assert "tokens/s" in capsys.readouterr().out
    first, step = (
        next(row for row in every if row.key.implementation == f"engine{part}")
        for part in (rollout.FIRST, rollout.STEP)
    )
    whole = first.timing.median_us + (5 - 1) * step.timing.median_us
    assert whole == pytest.approx(rows[0].timing.median_us), "a rollout is its first token and the steps after it"
    assert step.floor.bytes * 5 == rows[0].floor.bytes and first.floor is None


def test_rivals_and_shapes_are_chosen(tmp_path, capsys) -> None:
    out = tmp_path / "rows.jsonl"
    command = ["--preset", "tiny", "--device", "cpu", "--out", str(out), "--rival", "eager"]
    with one_thread():
        assert rollout.main([*command, "--shape", "width=32"]) == 0
    assert [row.key.implementation for row in read_rows(out) if row.kind == "baseline"] == ["eager"]
    assert rollout.main([*command, "--shape", "width=33"]) == 0, "no such shape"
    assert "nothing is left to measure" in capsys.readouterr().out
    for arguments, message in (
        (["--rival", "trl"], "--rival: expected some of eager,"),
        (["--resume"], "expected --out"),
    ):
        with pytest.raises(SystemExit, match=message):
            rollout.main(["--preset", "tiny", "--device", "cpu", *arguments])


def test_a_head_that_is_the_embedding_table_is_read_whole() -> None:
    """The bytes read include the whole head; a matrix tied to the embedding table counts once."""
    sizes = {"prompts": 1, "prompt": 2, "new": 2, "width": 32, "layers": 1, "vocabulary": 101, "mlp": 32, "heads": 2}
    tied, apart = (
        rollout.weight_bytes(rollout.make(Shape({**sizes, "kv_heads": 1, "tied": tied}), torch.device("cpu")))
        for tied in (1, 0)
    )
    assert tied == apart > 2 * 4 * 32 * 101


def test_wrong_logprobs_are_red_and_have_no_time(monkeypatch, capsys) -> None:
    monkeypatch.setattr(rollout, "largest_error", lambda pair, result: 9.0)
    with one_thread():
        assert rollout.main(["--preset", "tiny", "--device", "cpu"]) == 1
    assert "log-probabilities off by 9" in capsys.readouterr().out


def test_an_engine_that_is_wrong_or_fails_costs_its_own_row(monkeypatch, tmp_path) -> None:
    checked, out = [], tmp_path / "rows.jsonl"

    def error(pair, result):
        checked.append(result)
        if len(checked) == 2:
            raise RuntimeError("no kernel image")
        return 9.0 if len(checked) == 3 else 0.0

    monkeypatch.setattr(rollout, "largest_error", error)
    monkeypatch.setattr(rollout, "groups_of", lambda *_, chosen: [["engine", rollout.SDPA, rollout.PRODUCTS, "eager"]])
    with one_thread():
        assert rollout.main(["--preset", "tiny", "--device", "cpu", "--out", str(out)]) == 1
    rows = {row.key.implementation: (row.status, row.reasons) for row in read_rows(out) if row.kind != "part"}
    assert rows == {
        "engine": ("ok", ()),
        rollout.SDPA: ("failed", ("RuntimeError: no kernel image",)),
        rollout.PRODUCTS: ("red", ("log-probabilities off by 9",)),
        "eager": ("ok", ()),
    }


def test_groups_are_kept_one_by_one_and_a_second_run_measures_the_rest(tmp_path, monkeypatch, capsys) -> None:
    shape, names = rollout.SHAPES["tiny"][0], ("engine", rollout.PRODUCTS)
    monkeypatch.setattr(rollout, "groups_of", lambda *_, chosen: [[names[0], *(chosen or ())], [names[1]]])
    out, made = tmp_path / "rows.jsonl", rollout.make
    command = ["--preset", "tiny", "--device", "cpu", "--out", str(out), "--rival", "eager", "--resume"]
    calls = []

    def make(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory left")
        return made(*arguments)

    monkeypatch.setattr(rollout, "make", make)
    monkeypatch.setattr(runner, "source_state", lambda: ("c0ffee1", False))
    with one_thread():
        assert rollout.main(command) == 1
        assert [row.status for row in read_rows(out) if row.kind != "part"] == ["ok", "ok", "failed"]
        assert rollout.main(command) == 0 and len(calls) == 3
        assert [row.key.implementation for row in read_rows(out)][-3] == names[1]
        assert rollout.main(command) == 0 and len(calls) == 3
    assert "nothing is left to measure" in capsys.readouterr().out
    assert shape.label in {row.key.shape for row in read_rows(out)}


def test_the_groups_of_a_gpu_are_all_engines_with_the_targets_first() -> None:
    for shape in rollout.SHAPES["headline"]:
        groups = rollout.groups_of(shape, torch.device("cuda"), ["eager"])
        names = [name for group in groups for name in group]
        large = shape.sizes["width"] >= 2048
        unmeasured = {rollout.COMPILED_UNFUSED, rollout.COMPILED_LINEAR, rollout.COMPILED_STEPS, rollout.STEPS}
        few = unmeasured if large else {rollout.PROMPTS}
        few |= {rollout.TUNED, rollout.COMPILED_TUNED}  # in a run of their own
        assert set(names) == {*rollout.ENGINES, "eager"} - few and len(set(names)) == len(names)
        with_target = {each.ours.partition(":")[0] for each in HEADLINES if each.shape == shape.label and each.target}
        first = {name for group in groups[: len(with_target)] for name in group}
        assert first - {"eager"} == with_target and ("eager" in first) is not large
        assert [] not in rollout.groups_of(shape, torch.device("cuda"), [])


def test_plans_that_were_measured_are_timed_under_another_name(tmp_path) -> None:
    out = tmp_path / "rows.jsonl"
    with one_thread():
        assert rollout.main(["--preset", "tiny", "--device", "cpu", "--out", str(out), "--tuned"]) == 0
    rows = [row for row in read_rows(out) if row.kind != "part"]
    assert [row.key.implementation for row in rows] == [rollout.TUNED] and rows[0].timing is not None
    headline = rollout.SHAPES["headline"][0]
    assert rollout.tuned_groups(headline, torch.device("cuda")) == [[rollout.TUNED], [rollout.COMPILED_TUNED]]
