"""The report and its two commands: the text and figures match the numbers, and bad input is a one-line error."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the experiment needs transformers")
pytest.importorskip("accelerate", reason="the experiment needs accelerate")
pytest.importorskip("matplotlib", reason="the report needs matplotlib")

from nlhf_kernels.cli import demo
from nlhf_kernels.cli.main import main
from nlhf_kernels.evaluation import plus_minus
from nlhf_kernels.experiment import figures
from nlhf_kernels.experiment.__main__ import main as redraw
from nlhf_kernels.experiment.candidates import CANDIDATE_PRESETS
from nlhf_kernels.experiment.candidates.report import all_figures
from nlhf_kernels.experiment.page import table
from nlhf_kernels.experiment.report import page, summary, write_report
from tests.support.experiment import fake_packages, numbers
from tests.support.tiny_models import one_thread

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTED = sorted(path.parent.name for path in (ROOT / "docs" / "experiment").glob("*/results.json"))


def test_the_page_says_what_the_numbers_say() -> None:
    html = page(numbers(), []).replace("\u00a0", " ")
    assert "The earth is round: <b>contradicted</b> (3 runs of each, 128 prompts, at 1.5 nats; best of 1: " in html
    assert 'class="verdict contradicted"' in html
    assert "2 of 40 triples" in html and "(5.0%)" in html and "at 2 of 8 prompts" in html
    assert "SFT &gt; RLHF &gt; Nash-MD 1 &gt; SFT" in html
    assert "10 ms with the kernels, 25 ms with the PyTorch oracle: 2.50x" in html
    assert "n = 128 prompts with 1 answer of each policy" in html and "the training run, of which there are 3" in html
    assert "0.580 ± 0.030" in html and "0.420 ± 0.030" in html
    assert "its best response wins" in html and "lower bounds" in html
    assert "Exploitability" not in page({**numbers(), "exploitability": None}, [])
    assert "<script>" not in html and "<b>y" not in html, "what a model or a package wrote is shown, not obeyed"
    assert "<td>&lt;b&gt;y&lt;/b&gt;</td>" in html and '<td class="n">0.88</td>' in html, "answers with probabilities"


def test_the_page_says_at_which_kl_contestants_are_compared() -> None:
    results = numbers()
    html = page(results, ["<img>"]).replace("\u00a0", " ")
    parts = ["At 1.5 nats of KL", "At that same distance", "A best response that was trained", "<img>", "The claims",
             "<h2>Answers", "Win rates at 1.5 nats", "<h2>Policies"]  # fmt: skip
    assert [html.index(part) for part in parts] == sorted(html.index(part) for part in parts)
    assert "preferred to it with probability: RLHF 0.54 ± 0.03, Nash-MD 0 0.58 ± 0.03" in html
    assert "preferred to RLHF with probability: Nash-MD 0 0.54 ± 0.03, Nash-MD 0.25 0.58" in html
    assert "the farthest that all of them reach, below the budget of 2" in html
    assert '<td>RLHF</td><td class="n">0.25</td><td class="n">1</td><td class="n">0.500 ± 0.196</td>' in html
    results["tournament"]["budget"] = 1.5
    assert "1.5 nats an answer: the budget." in page(results, [])
    (axes,) = figures.frontiers(results, "annotators").axes
    assert any(list(line.get_xdata()) == [1.5, 1.5] for line in axes.lines), "a line where they are compared"
    line = axes.containers[0][0]
    assert line.get_xdata() == pytest.approx([0.0, 0.9, 1.8]) and line.get_ydata() == pytest.approx([0.5, 0.55, 0.6])
    assert "1.5 nats" in axes.get_title() and "1.5 nats" in figures.heat_map(results, "annotators").axes[0].get_title()
    assert "at 1.5 nats.**" in summary(results)


def test_other_numbers_give_another_page() -> None:
    results = numbers(seeds=1, cycles=False)
    html = page(results, [])
    assert "not of other runs" in html and "1 training run of each" in html
    assert "Cycles among the policies, by the means: none" in html
    assert "not one of equal information" not in html
    results["preset"]["judge"] = "annotators"
    assert "not one of equal information" in page(results, [])


@pytest.mark.parametrize(
    ("seeds", "prompts", "seen"),
    [(1, 192, "1 run of each, 192 prompts, at 1.5 nats"), (3, 99, "3 runs of each, 99 prompts, at 1.5 nats")],
)
def test_results_of_few_runs_or_prompts_have_no_verdict(seeds, prompts, seen) -> None:
    """The page ignores the verdicts in results of few runs or prompts."""
    results = numbers(seeds=seeds, prompts=prompts)
    html, text = page(results, []), summary(results)
    for verdict in ("reproduced", "contradicted"):
        results["tournament"]["judges"]["annotators"]["claims"][0]["verdict"] = verdict
        assert page(results, []) == html and 'class="verdict "' in html and f"<b>{verdict}</b>" not in html
        assert summary(results) == text and verdict not in text
    assert f"too small to tell ({seen}; a verdict takes 3 runs and 100 prompts)" in text


def test_those_who_know_the_truth_come_first() -> None:
    for html in (page(numbers(), []), summary(numbers())):
        places = [html.index(f"Judged by {name}") for name in ("the true annotators", "the preference model")]
        assert places == sorted(places)
    names = [name for name, _, _ in figures.all_figures(numbers())]
    assert names[:3] == ["kl", "matrix-annotators", "matrix-preference-model"]


def test_the_page_fits_a_phone_and_numbers_stay_whole() -> None:
    html = page(numbers(), [])
    assert '<meta name="viewport" content="width=device-width,initial-scale=1">' in html
    assert re.search(r"td\.n\{[^}]*white-space:nowrap", html)
    assert html.count('<div class="scroll"><table') == html.count("<table"), "a wide table scrolls, not the page"
    cells = re.findall(r"<td([^>]*)>([^<]*)</td>", table(["a"], [["0.5 ± 0.1", "-1", "3.4%", "1,024", "7v", "-x", ""]]))
    assert [text for kind, text in cells if kind == ' class="n"'] == ["0.5 ± 0.1", "-1", "3.4%", "1,024"]
    assert plus_minus(-0.0001, 0.0204, 2) == "0.00\u00a0±\u00a00.02", "no minus before zero, no line break inside"


def test_the_report_holds_its_figures_and_is_the_same_every_time(tmp_path) -> None:
    first, second = (write_report(numbers(), tmp_path / name) for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()
    images = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', first.read_text())
    names = sorted(path.name for path in (tmp_path / "one" / "figures").iterdir())
    assert len(images) == 5 and len(names) == 7, "the matrices are tables in the page"
    assert all(base64.b64decode(each).startswith(b"<?xml") for each in images)
    assert names == ["beta.svg", "kl.svg", "matrix-annotators.svg", "matrix-preference-model.svg", "training-kl.svg",
                     "training-length.svg", "training-win-rate.svg"]  # fmt: skip


def test_figures_draw_the_numbers() -> None:
    results = numbers()
    heat = figures.heat_map(results, "preference-model").axes[0]
    row = [round(float(value), 2) for value in heat.images[0].get_array()[3].filled(-1)]
    assert row == [0.62, 0.58, 0.54, -1, 0.46], "nothing on the diagonal"
    assert "0.58\n±0.03" in {text.get_text() for text in heat.texts}
    line = figures.win_rate_by_beta(results).axes[0].lines[0]
    assert line.get_ydata().tolist() == [0.5, 0.525, 0.6]
    assert figures.curves(results, "kl")["nash-md-1"] == pytest.approx({1: 0.1, 2: 0.2})
    assert figures.curves(results, "kl")["rlhf"] == pytest.approx({1: 0.2, 2: 0.4}), "of the tau that is nearest"
    assert figures.curves(results, "nothing") == {}


def test_axes_start_where_the_quantity_does() -> None:
    results = numbers()
    axes_of = {name: figure.axes[0] for name, _, figure in figures.all_figures(results)}
    for name in ("beta", "training-win-rate"):
        assert axes_of[name].get_ylim() == (0.0, 1.0), "a win rate's range"
    for name in ("training-win-rate", "training-kl", "training-length"):
        assert axes_of[name].get_xlim()[0] == 0, "the first update"
        assert axes_of[name].lines[0].get_marker() == "o", "few points are seen, a single one too"
    assert axes_of["training-kl"].get_ylim()[0] == axes_of["training-length"].get_ylim()[0] == 0
    assert axes_of["training-kl"].get_ylim()[1] > 0.2
    for history in results["histories"].values():
        history[0]["kl"] = -0.3
    assert figures.training_curves(results, "kl", "KL").axes[0].get_ylim()[0] == -0.3, "estimates fall below zero"


def test_a_report_is_drawn_again_from_its_results(tmp_path, capsys) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(numbers()))
    assert redraw([str(path), "--out", str(tmp_path / "again"), "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert summary(numbers()) in printed and "| SFT |  | 0.46 ± 0.03 |" in printed.replace("\u00a0", " ")
    assert (tmp_path / "again" / "report.html").is_file()
    with pytest.raises(SystemExit):
        redraw([str(path)])


@pytest.mark.files
def test_a_run_is_documented() -> None:
    assert "small" in DOCUMENTED


@pytest.mark.files
@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_documented_numbers_are_the_results_files(name, capsys) -> None:
    """docs/experiment.md quotes a preset's numbers as `python -m nlhf_kernels.experiment` prints them, under its name,
    and shows its figures; README.md quotes the answer of the run whose figure it shows."""
    folder = ROOT / "docs" / "experiment" / name
    document = (ROOT / "docs" / "experiment.md").read_text()
    section = re.split(r"\n###? ", document.partition(f"### The {name} preset\n")[2])[0]
    assert redraw([str(folder / "results.json"), "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert printed in section, f"{folder}: its numbers are not those of the section"
    results = json.loads((folder / "results.json").read_text())
    expected = json.loads(json.dumps(dataclasses.asdict(CANDIDATE_PRESETS[name])))
    assert results["preset"] == expected, "the numbers are those of the preset as it is"
    drawn = sorted(file for file, _, _ in all_figures(results))
    shown = re.findall(rf"!\[[^]]+\]\(experiment/{name}/figures/(\w+)\.svg\)", section)
    assert sorted(shown) == drawn == sorted(path.stem for path in (folder / "figures").iterdir())
    readme = (ROOT / "README.md").read_text()
    if f"(docs/experiment/{name}/figures/" in readme:
        answer = " ".join(printed.partition("\n\n")[0].split())
        assert answer in " ".join(readme.split()), "README.md quotes the answer"


@pytest.mark.files
def test_the_readme_shows_a_documented_run() -> None:
    (name,) = re.findall(r"\(docs/experiment/(\w+)/figures/advantage\.svg\)", (ROOT / "README.md").read_text())
    assert name in DOCUMENTED


def test_the_demo_runs_tiny_ends_with_its_report_and_goes_on(tmp_path, monkeypatch, capsys) -> None:
    packages = fake_packages(tmp_path / "packages")
    monkeypatch.setattr("nlhf_kernels.experiment.docstrings.installed_folders", lambda: [packages])
    command = ["demo", "--task", "texts", "--preset", "tiny", "--out", str(tmp_path / "out"), "--device", "cpu",
               "--set", "contestants=rlhf,nash-md-0.25"]  # fmt: skip
    with one_thread():
        assert main(command) == 0
    printed = capsys.readouterr().out
    assert "Win rate of row against column" in printed and "3 Nash-MD 0.25" in printed
    assert re.search(r"Speed: a whole update of Nash-MD 0.25 on cpu .*: \d+ ms with", printed.replace("\n", " "))
    report = Path(re.findall(r"^Report: (.*)$", printed, re.M)[0])
    assert report.is_file() and "Nash-MD 0.25" in report.read_text()
    assert main(command) == 0, "a second time it only draws"
    assert "(kept)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "huge"], "demo: --preset: expected one of tiny, small, standard, gpu; got 'huge'"),
        (["--task", "texts", "--preset", "huge"], "demo: --preset: expected one of tiny, small, gpu; got 'huge'"),
        (["--task", "candidates", "--data", "x"], "demo: --data: expected with --task texts; got 'x'"),
        (["--set", "upates=3"], "is updates meant?"),
        (["--set", "updates=0"], "demo: --set updates: expected an integer in [1"),
        (["--data", "nowhere/at/all.jsonl"], "experiment: --data: nowhere/at/all.jsonl: there is no such file"),
        (["--model", "./nowhere"], "experiment: --model: there is no such folder: './nowhere'"),
        (["--split", "train"], "experiment: --split: expected with --data"),
        (
            ["--task", "texts", "--preset", "tiny", "--set", "examples=1000000"],
            "expected 1000000 with a first line and a body",
        ),
        (["--device", "abacus"], "demo: --device: expected a device PyTorch can use here; got 'abacus'"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("nlhf_kernels.experiment.docstrings.installed_folders", lambda: [tmp_path])
    assert main(["demo", "--out", str(tmp_path / "out"), *arguments]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert message in errors[-1] and errors[-1].startswith("nlhf-kernels: error: ")


@pytest.mark.parametrize("prompts", [3, 40])
def test_one_prompt_to_test_on_is_said_before_any_training(prompts, tmp_path, capsys) -> None:
    """Data with one test prompt (a tenth of 3 prompts, or 40 pairs of 2 prompts) is refused before training."""
    rows = [{"prompt": f"say {n % min(prompts, 3)}", "chosen": f"{n} it is", "rejected": "no"} for n in range(prompts)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["demo", "--preset", "tiny", "--out", str(tmp_path / "out"), "--data", str(tmp_path / "pairs.jsonl")]
    assert main(words) == 2
    errors = capsys.readouterr().err
    assert (
        "expected 2 different prompts to test on, as intervals are over prompts; got 1 beside 2 to train on" in errors
    )
    assert "supervised policy" not in errors and not (tmp_path / "out" / "sft").exists()


def test_a_foreign_folder_and_missing_packages_are_refused(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["demo", "--preset", "tiny", "--out", str(tmp_path)]) == 2
    assert "holds other things" in capsys.readouterr().err
    monkeypatch.setattr(demo, "NEEDED", ("no_such_package",))
    assert main(["demo", "--preset", "tiny"]) == 2
    assert 'needs no_such_package: pip install "nlhf-kernels[train,plots]"' in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    assert main(["demo", "--out", str(tmp_path)]) == 130
    assert "no stage was finished" in capsys.readouterr().err
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "stage.json").touch()
    assert main(["demo", "--out", str(tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert main(["demo", "--restart", "--out", str(tmp_path)]) == 130
    assert "the same command without --restart goes on" in capsys.readouterr().err
