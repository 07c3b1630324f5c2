"""`nlhf-kernels tabular` as a person uses it, and what it says to bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nlhf_kernels.cli.main import main


def run(*arguments: str) -> int:
    return main(["tabular", *arguments])


def test_table_and_figure(tmp_path, capsys) -> None:
    figure = tmp_path / "folder" / "out.png"
    assert run("--game", "dice", "--steps", "300", "--plot", str(figure)) == 0
    printed = capsys.readouterr().out
    for word in ("nash-md", "omd", "ema", "nash-mp", "KL to equilibrium", "exploitability", "seconds", "Figure:"):
        assert word in printed
    assert figure.stat().st_size > 20_000


@pytest.mark.parametrize("suffix", ["svg", "pdf"])
def test_other_figures_and_larger_games(tmp_path, suffix, capsys) -> None:
    figure = tmp_path / f"out.{suffix}"
    assert run("--game", "random", "--steps", "50", "--algorithms", "policy-gradient,egpo", "--plot", str(figure)) == 0
    assert figure.stat().st_size > 5000


def test_json_is_json_and_nothing_else(capsys) -> None:
    assert run("--game", "cyclic", "--reference", "0.5,0.3,0.2", "--steps", "500", "--tau", "0.2", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert sum(result["equilibrium"]) == pytest.approx(1)
    nash_mp = result["algorithms"]["nash-mp"]
    assert nash_mp["kl"][-1] < 1e-12
    assert nash_mp["exploitability"][-1] < 1e-12
    assert len(nash_mp["steps"]) == len(nash_mp["kl"])
    assert nash_mp["steps"][-1] == 500


def test_matrix_files_agree(tmp_path, capsys) -> None:
    matrix = [[0.5, 0.8], [0.2, 0.5]]
    (tmp_path / "plain.csv").write_text("0.5,0.8\n0.2,0.5\n")
    (tmp_path / "named.csv").write_text(",tea,coffee\ntea,0.5,0.8\ncoffee,0.2,0.5\n")
    (tmp_path / "rows.json").write_text(json.dumps(matrix))
    (tmp_path / "named.json").write_text(json.dumps({"actions": ["tea", "coffee"], "preference": matrix}))
    np.save(tmp_path / "matrix.npy", np.array(matrix))
    equilibria = []
    for path in sorted(tmp_path.iterdir()):
        assert run("--file", str(path), "--steps", "10", "--json") == 0
        result = json.loads(capsys.readouterr().out)
        assert result["actions"] == (["tea", "coffee"] if "named" in path.name else ["0", "1"])
        equilibria.append(result["equilibrium"])
    assert len(equilibria) == 5
    assert all(equilibrium == pytest.approx(equilibria[0]) for equilibrium in equilibria)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (",tea,coffee\ntea,0.5,0.8\ncoffee,0.3,0.5\n", "got P(tea > coffee) = 0.8 and 0.3 the other way round"),
        ("0.5,1.8\n-0.8,0.5\n", "expected values in [0, 1]; got P(0 > 1) = 1.8"),
        ("0.5,0.8\n0.2\n", "row 1: expected 2 numbers, as there are rows; got 1"),
        ("0.5,x\n0.2,0.5\n", "expected"),
        ("", "expected shape"),
    ],
)
def test_bad_matrix_is_refused_with_the_pair(tmp_path, capsys, text, message) -> None:
    path = tmp_path / "game.csv"
    path.write_text(text)
    assert run("--file", str(path)) == 2
    error = capsys.readouterr().err
    assert "game.csv" in error
    assert message in error
    assert error.count("\n") == 1, "one line, no traceback"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--file", "nowhere.csv"], "there is no such file"),
        (["--file", "matrix.txt"], "expected a file that ends in .csv, .json, .npy"),
        (["--algorithms", "nash"], "--algorithms: expected some of nash-md"),
        (["--tau", "0"], "tau: expected a finite number above 0; got 0"),
        (["--steps", "0"], "--steps: expected at least 1; got 0"),
        (["--step-size", "-1"], "step: expected a finite number of at least 0; got -1"),
        (["--reference", "0.5,0.5"], "--reference: expected 3 probabilities above 0"),
        (["--start", "a,b,c"], "--start: expected numbers separated by commas"),
        (["--game", "random", "--tau", "1e-9"], "equilibrium: still moving"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys, monkeypatch) -> None:
    monkeypatch.setattr("nlhf_kernels.tabular.equilibrium.__kwdefaults__", {"tolerance": 1e-13, "max_steps": 200})
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
