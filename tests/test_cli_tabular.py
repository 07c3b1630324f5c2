"""`nlhf-kernels tabular`: tables, figures and JSON, and errors for bad input."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from nlhf_kernels.cli.main import main


def run(*arguments: str) -> int:
    return main(["tabular", *arguments])


def test_table_and_figure(tmp_path, capsys) -> None:
    figure = tmp_path / "folder" / "out.png"
    assert run("--game", "dice", "--steps", "300", "--plot", str(figure)) == 0
    printed = capsys.readouterr().out
    for word in ("nash-md", "omd@2", "ema", "nash-mp", "KL", "exploitability", "seconds", "Figure:"):
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
        ("0.5,0.8\n\n0.2\n", "line 3: expected 2 numbers, as there are rows; got 1"),
        ("0.5,x\n0.2,0.5\n", "actions: expected 1 names, as there are rows; got 2"),
        ("0.5,0.8\nx,0.5\n", "line 2: expected numbers; got 'x'"),
        ("0.5,nan\n0.2,0.5\n", "expected numbers; got 'nan'"),
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


OTHER_FILES = {
    "a.json": ('{"actions": ["tea"], "preference": [[0.5, 0.8], [0.2, 0.5]]}', "expected 2 names, as there are rows"),
    "b.json": ("[[0.5, null], [0.2, 0.5]]", "row 0: expected numbers; got nothing (null)"),
    "c.json": ("null", "expected a list of rows"),
    "d.json": ('{"actions": "tea", "preference": [[0.5]]}', "actions: expected a list of names; got 'tea'"),
    "e.json": ('{"preference": [[0.5]], "preference": [[0.5]]}', "the key 'preference' is there twice"),
    "f.json": ("[[0.5, true], [0.2, 0.5]]", "row 0: expected numbers; got True"),
    "g.json": ("[" * 100_000, "nested too deeply"),
    "h.npy": (np.array(0.5), "expected a matrix of numbers; got shape () of float64"),
    "i.npy": (np.zeros((2, 2, 2)), "expected a matrix of numbers; got shape (2, 2, 2) of float64"),
    "j.npy": (np.array([["a"]]), "expected a matrix of numbers; got shape (1, 1) of <U1"),
    "k.npy": (np.array([[None]], dtype=object), "expected an array of numbers, as numpy.save writes it; got"),
    "l.npy": ("", "expected an array of numbers, as numpy.save writes it; got"),
    "m.npy": (np.full((2, 2), 0.5)[:1], "row 0: expected 1 numbers, as there are rows; got 2"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_files_of_other_things_are_named(tmp_path, capsys, name) -> None:
    content, message = OTHER_FILES[name]
    path = tmp_path / name
    path.write_text(content) if isinstance(content, str) else np.save(path, content)
    assert run("--file", str(path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"nlhf-kernels: error: {path}: ") and message in line


def test_a_mark_before_the_text_is_no_part_of_it(tmp_path, capsys) -> None:
    for name, text in (("a.csv", "0.5,0.8\n0.2,0.5\n"), ("b.JSON", "[[0.5, 0.8], [0.2, 0.5]]")):
        (tmp_path / name).write_text("\ufeff" + text)
        assert run("--file", str(tmp_path / name), "--steps", "10", "--json") == 0
        assert json.loads(capsys.readouterr().out)["actions"] == ["0", "1"]


def test_the_default_game_tells_algorithms_apart(capsys) -> None:
    """Nash-MD reaches the equilibrium; self-play with constant steps, and against its average, cycles."""
    assert run("--steps", "2000", "--json") == 0
    kl = {name: outcome["kl"][-1] for name, outcome in json.loads(capsys.readouterr().out)["algorithms"].items()}
    assert kl["nash-md"] < 1e-8 and kl["nash-mp"] < 1e-8
    assert kl["omd@2"] > 0.1 and kl["ema"] > 0.1
    assert run("--steps", "2000") == 0
    printed = capsys.readouterr().out
    assert "At the equilibrium (KL below 1e-06): nash-md, nash-mp\nNot there: omd@2, ema\n" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_names_are_no_markup(tmp_path, capsys) -> None:
    (tmp_path / "a.csv").write_text("[/],:smile:,$a$\n0.5,0.8,0.3\n0.2,0.5,0.6\n0.7,0.4,0.5\n")
    assert run("--file", str(tmp_path / "a.csv"), "--steps", "10", "--plot", str(tmp_path / "a.png")) == 0
    assert "[/] 0." in (printed := capsys.readouterr().out) and ":smile: 0." in printed


def test_a_figure_that_cannot_be_is_said_before_the_work(monkeypatch, capsys) -> None:
    monkeypatch.setattr("nlhf_kernels.tabular.solve", None)
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run("--plot", "out.png") == 2
    assert 'needs matplotlib: pip install "nlhf-kernels[plots]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--file", "nowhere.csv"], "there is no such file"),
        (["--file", "matrix.txt"], "expected a file that ends in .csv, .json, .npy"),
        (["--algorithms", "nash"], "--algorithms: expected some of nash-md"),
        (["--tau", "0"], "tabular: --tau: expected a finite number above 0; got 0"),
        (["--steps", "0"], "--steps: expected at least 1; got 0"),
        (["--algorithms", "omd@-1"], "--algorithms: expected some of nash-md, omd, ema"),
        (["--algorithms", "nash-mp@1"], "NAME or (but for nash-mp) NAME@STEP, omd@2 say; got 'nash-mp@1'"),
        (["--plot", "out.gif"], "tabular: --plot: expected a file that ends in .png, .svg, .pdf; got 'out.gif'"),
        (["--plot", "/dev/null/out.png"], "tabular: --plot: expected a file that can be written"),
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
