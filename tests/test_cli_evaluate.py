"""`nlhf-kernels evaluate`: saved policies against each other, judged by a model or a function."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="evaluation is a part of training's extra")

from nlhf_kernels.cli import evaluate as command
from nlhf_kernels.cli.main import main
from nlhf_kernels.preference import PairwisePreferenceModel, save_preference_model
from tests.support.tiny_models import tiny_model, tiny_tokenizer
from tests.support.training import single_thread  # noqa: F401


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Two policies, a preference model, prompts."""
    folder, tokenizer = tmp_path_factory.mktemp("saved"), tiny_tokenizer()
    for seed, name in enumerate(("one", "two")):
        tiny_model("llama", seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    save_preference_model(PairwisePreferenceModel(tiny_model("llama", seed=5), tokenizer), folder / "judge")
    rows = [{"prompt": f"say {letter}"} for letter in "abcdefa"]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def evaluate(saved: Path, *more: str, policies: tuple[str, ...] = ("one", "other=two")) -> list[str]:
    names = [entry.replace("one", str(saved / "one")).replace("two", str(saved / "two")) for entry in policies]
    options = [word for name in names for word in ("--policy", name)]
    return ["evaluate", *options, "--judge", str(saved / "judge"), "--data", str(saved / "prompts.jsonl"),
            "--max-new-tokens", "5", "--device", "cpu", *more]  # fmt: skip


def test_saved_policies_are_compared(saved, tmp_path, capsys) -> None:
    output = tmp_path / "matrix.json"
    assert main(evaluate(saved, "--json", "--reference", str(saved / "one"), "--output", str(output))) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads(output.read_text())
    assert document["prompts"] == 6, "every prompt once"
    one, other = document["policies"]
    assert (one["name"], other["name"]) == ("one", "other")
    assert one["kl"] == pytest.approx(0.0, abs=1e-5) and other["kl"] > 0
    cell = document["matrix"][0][1]
    assert 0 <= cell["mean"] <= 1 and cell["prompts"] == 6 and document["matrix"][0][0] is None
    assert main(evaluate(saved, "--samples", "2", "--prompts", "3")) == 0
    assert "3 prompts, 2 answers to each" in capsys.readouterr().out


@pytest.mark.parametrize(("samples", "even"), [("1", False), ("3", True)])
def test_policies_share_their_noise_where_they_answer_twice(samples, even, saved, tmp_path, capsys) -> None:
    """A policy against itself is even to the last bit with several samples; with one, each has its own noise."""
    code = (
        "def order(prompts, first, second):\n    return [((a < b) - (a > b) + 1) / 2 for a, b in zip(first, second)]\n"
    )
    (tmp_path / "judge.py").write_text(code)
    judge = f"{tmp_path / 'judge.py'}:order"
    assert main(evaluate(saved, "--json", "--samples", samples, "--judge", judge, policies=("a=one", "b=one"))) == 0
    cell = json.loads(capsys.readouterr().out)["matrix"][0][1]
    assert (abs(cell["mean"] - 0.5) < 1e-12 and cell["half"] < 1e-12) is even


@pytest.mark.parametrize(
    ("more", "policies", "message"),
    [
        ((), ("one",), "evaluate: --policy: expected two or more; got 1"),
        ((), ("a=one", "a=two"), "evaluate: --policy: expected [NAME=]MODEL, every name once; got 'a' again"),
        ((), ("one", "one"), "evaluate: --policy: expected [NAME=]MODEL, every name once; got 'one' again"),
        ((), ("one", "b="), "evaluate: --policy: expected [NAME=]MODEL, every name once"),
        (("--max-new-tokens", "0"), ("one", "two"), "evaluate: --max-new-tokens: expected an integer in [1"),
        (("--max-prompt-length", "0"), ("one", "two"), "evaluate: --max-prompt-length: expected an integer in [2"),
        (("--batch-size", "0"), ("one", "two"), "evaluate: --batch-size: expected an integer in [1"),
        (("--judge", "nowhere.py:f"), ("one", "two"), "evaluate: --judge: cannot load 'nowhere.py:f': FileNotFound"),
        (("--judge", "math:pi"), ("one", "two"), "evaluate: --judge: expected a function; got float as 'math:pi'"),
        (("--prompts", "1"), ("one", "two"), "evaluate: --prompts: expected an integer in [2"),
        (("--judge", "./nowhere"), ("one", "two"), "evaluate: --judge: there is no such folder"),
        (("--samples", "0"), ("one", "two"), "evaluate: --samples: expected an integer in [1"),
        (
            ("--output", "nowhere/x.json"),
            ("one", "two"),
            "expected a file in a folder that is there",
        ),
        ((), ("one", "/nowhere/two"), "evaluate: --policy: there is no such folder: '/nowhere/"),
        (("--data", "./nowhere.jsonl"), ("one", "two"), "evaluate: --data: ./nowhere.jsonl: there is no such file"),
        (("--reference", "./nowhere"), ("one", "two"), "evaluate: --reference: there is no such folder"),
    ],
)
def test_evaluate_refuses_in_one_line(more, policies, message, saved, monkeypatch, capsys) -> None:
    monkeypatch.setattr(command, "load_model", None)
    assert main(evaluate(saved, *more, policies=policies)) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert message in errors[-1]


def test_names_that_tell_policies_apart() -> None:
    assert command._policies(["runs/a/policy", "runs/b/policy"]) == {
        "a/policy": "runs/a/policy", "b/policy": "runs/b/policy"
    }  # fmt: skip
    assert [*command._policies(["x/a/p", "y/a/p", "q", "n=x/a/p"])] == ["x/a/p", "y/a/p", "q", "n"]
    assert [*command._policies(["p", "a/p"])] == [f"{Path.cwd().name}/p", "a/p"]
    assert [*command._policies(["./sft/", "../x/nash"])] == ["sft", "nash"]


def test_a_function_judges(saved, tmp_path, monkeypatch, capsys) -> None:
    """A judge function loads from a file and from a module in the working folder; names are printed literally."""
    code = "def shorter(prompts, first, second):\n    return [float(len(a) < len(b)) for a, b in zip(first, second)]\n"
    (tmp_path / "my_judge.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    documents = []
    for judge in (str(tmp_path / "my_judge.py") + ":shorter", "my_judge:shorter"):
        assert main(evaluate(saved, "--judge", judge, "--json")) == 0
        documents.append(json.loads(capsys.readouterr().out) | {"judge": ""})
    assert documents[0] == documents[1]
    assert main(evaluate(saved, "--judge", "my_judge:shorter", policies=("[/]=one", ":smile:=two"))) == 0
    shown = capsys.readouterr().out
    assert "1 [/]" in shown and "2 :smile:" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_five_policies_fit_80_columns(saved, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    cell = {"mean": 0.5, "half": 0.25}
    policies = [{"name": f"a-policy-of-a-long-name-{n}", "tokens": 12.0, "kl": 1.0, "kl_error": 0.1} for n in range(5)]
    document = {"policies": policies, "matrix": [[None if a == b else cell for a in range(5)] for b in range(5)],
                "prompts": 8, "samples": 1, "cycles": []}  # fmt: skip
    shown = command._table(document)
    assert "0.50±0.25" in shown and "..." not in shown and max(map(len, shown.splitlines())) <= 80
