"""`nlhf-kernels prefer`: training to a folder, probabilities from a folder, and one-line errors for bad input."""

from __future__ import annotations

import json
import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from nlhf_kernels.cli import prefer
from nlhf_kernels.cli.main import main
from nlhf_kernels.preference import RewardModel, load_preference_model, save_preference_model
from tests.support.damaged import damaged, nan
from tests.support.preference import comparison_model, shorter_wins
from tests.support.tiny_models import one_thread, tiny_model, tiny_tokenizer


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Data, a base, a template and a trained model."""
    root = tmp_path_factory.mktemp("prefer")
    for part in (tiny_model("llama"), tiny_tokenizer(chat=True)):
        part.save_pretrained(root / "base")
    tiny_model("llama").save_pretrained(root / "weights_only")
    pairs = [pair._asdict() for pair in shorter_wins(40)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (root / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    (root / "long.jsonl").write_text("".join(json.dumps(pair | {"prompt": "a" * 50}) + "\n" for pair in pairs))
    (root / "template.txt").write_text("{prompt}|{first}|{second}=")
    (root / "reward.txt").write_text("{prompt}|{response}=")
    (root / "compare.jsonl").write_text(
        "".join(json.dumps({"prompt": p, "first": a, "second": b}) + "\n" for p, a, b in shorter_wins(5))
    )
    save_preference_model(comparison_model(), root / "model")
    shutil.copytree(root / "model", root / "broken")
    shutil.rmtree(root / "broken" / "body")
    damaged(root / "model" / "body", root / "broken" / "body", nan)
    return root


def run(capsys, *options: object) -> tuple[int, str, str]:
    code = main(["prefer", *map(str, options)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def training(root, output, *options: object) -> list[object]:
    common = ["--data", root / "pairs.jsonl", "--base", root / "base", "--output", output, "--device", "cpu"]
    return ["train", *common, "--template", root / "template.txt", "--batch-size", 8, *options]


def test_train_then_score(root, tmp_path, capsys) -> None:
    options = ["--steps", 6, "--micro-batch", 3, "--learning-rate", 1e-2, "--seed", 3, "--json"]
    code, out, err = run(capsys, *training(root, tmp_path / "out", *options))
    document = json.loads(out)
    assert code == 0 and "Traceback" not in err
    assert len(document["losses"]) == 6 and document["losses"][0] == pytest.approx(math.log(2))
    assert document["pairs"] == 36 and document["evaluation"]["count"] == 4
    model = load_preference_model(tmp_path / "out")
    assert model.head.weight.abs().max() > 0 and model.input_format.template == "{prompt}|{first}|{second}="
    score = ["score", "--model", tmp_path / "out", "--device", "cpu"]
    code, out, _ = run(capsys, *score, "--prompt", "abc", "--first", "d", "--second", "efgh")
    expected = model.probabilities(["abc"], ["d"], ["efgh"]).item()
    assert code == 0 and out == f"P(first > second) = {expected:.4f}\n"
    _, out, _ = run(capsys, *score, "--prompt", "abc", "--first", "d", "--second", "efgh", "--json")
    assert json.loads(out) == [{"prompt": "abc", "first": "d", "second": "efgh", "probability": expected}]


def test_the_same_seed_gives_the_same_model(root, tmp_path, capsys) -> None:
    for name in ("one", "two"):
        assert run(capsys, *training(root, tmp_path / name, "--steps", 3, "--learning-rate", 1e-2))[0] == 0
    one, two = (load_preference_model(tmp_path / name).state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_tables_say_how_good_it_is(root, tmp_path, capsys) -> None:
    """The tables show the measures; the default is one epoch, here 36 of 40 pairs in steps of 8."""
    code, out, _ = run(capsys, *training(root, tmp_path / "out", "--bfloat16", "--gradient-checkpointing"))
    words = " ".join(out.split())
    assert code == 0
    for part in ("36 pairs, 5 steps", "held out: 4 pairs: accuracy", "calibration error", "mean confidence", "Saved:"):
        assert part in words


def test_reward_models_held_out_files_and_none(root, tmp_path, capsys) -> None:
    reward = ["--kind", "reward", "--template", root / "reward.txt", "--steps", 1, "--json"]
    held_out = ["--held-out", root / "pairs.jsonl"]
    _, out, _ = run(capsys, *training(root, tmp_path / "a", *reward, *held_out))
    assert json.loads(out)["pairs"] == json.loads(out)["evaluation"]["count"] == 40
    assert isinstance(load_preference_model(tmp_path / "a"), RewardModel)
    _, out, _ = run(capsys, *training(root, tmp_path / "b", *reward, "--test-fraction", 0))
    assert json.loads(out)["pairs"] == 40 and json.loads(out)["evaluation"] is None


def test_scores_of_a_file(root, tmp_path, capsys) -> None:
    score = ["score", "--model", root / "model", "--file", root / "compare.jsonl", "--device", "cpu"]
    code, out, _ = run(capsys, *score)
    rows = [json.loads(line) for line in out.splitlines()]
    expected = comparison_model().probabilities(*([pair[i] for pair in shorter_wins(5)] for i in range(3)))
    assert code == 0 and [row["probability"] for row in rows] == expected.tolist()
    assert [list(row) for row in rows] == [["prompt", "first", "second", "probability"]] * 5
    _, as_json, _ = run(capsys, *score, "--json", "--batch-size", 2)
    again = [row["probability"] for row in json.loads(as_json)]
    assert again == pytest.approx(expected.tolist(), abs=1e-6)
    code, out, _ = run(capsys, *score, "--output", tmp_path / "scores.jsonl")
    assert code == 0 and out == f"Saved: {tmp_path / 'scores.jsonl'}\n"
    assert [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()] == rows


def test_evaluate_measures_as_training_does(root, tmp_path, capsys) -> None:
    options = ["--steps", 3, "--learning-rate", 1e-2, "--held-out", root / "pairs.jsonl", "--json"]
    training_evaluation = json.loads(run(capsys, *training(root, tmp_path / "out", *options))[1])["evaluation"]
    words = ["evaluate", "--model", tmp_path / "out", "--data", root / "pairs.jsonl", "--device", "cpu"]
    code, out, _ = run(capsys, *words, "--json")
    measures = json.loads(out)
    assert code == 0 and measures["count"] == 40
    for name in ("accuracy", "log_loss", "calibration_error"):
        assert measures[name] == pytest.approx(training_evaluation[name], abs=1e-5)
    code, out, _ = run(capsys, *words, "--batch-size", 3)
    low, high = prefer.wilson(measures["accuracy"], 40)
    assert (
        code == 0 and f"40 pairs: accuracy {measures['accuracy']:.3f} (95 % interval: {low:.3f} to {high:.3f})" in out
    )
    code, _, err = run(capsys, *words[:3], "--data", root / "compare.jsonl")
    assert code == 2 and "line 1: expected columns prompt, chosen, rejected; chosen is not among" in err


def test_intervals_of_shares() -> None:
    """Intervals are Wilson's (1927): that of 10 of 10 has a positive width."""
    assert prefer.wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-3)
    assert prefer.wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-3)


def test_one_pair_as_a_conversation(root, tmp_path, capsys) -> None:
    model = comparison_model()
    model.tokenizer.chat_template = "{% for m in messages %}{{ '[' + m.role + m.content + ']' }}{% endfor %}" + (
        "{% if add_generation_prompt %}[assistant{% endif %}"
    )
    save_preference_model(model, tmp_path / "chatty")
    words = ["score", "--model", tmp_path / "chatty", "--prompt", "a", "--first", "bc", "--second", "d", "--json"]
    _, out, _ = run(capsys, *words, "--chat", "--device", "cpu")
    expected = model.probabilities(["[usera][assistant"], ["bc]"], ["d]"]).item()
    assert json.loads(out) == [{"prompt": "[usera][assistant", "first": "bc]", "second": "d]", "probability": expected}]
    assert expected != json.loads(run(capsys, *words, "--device", "cpu")[1])[0]["probability"]


def test_conversations_and_truncation(root, tmp_path, capsys) -> None:
    talk = [{name: [{"role": "user", "content": text}] for name, text in pair._asdict().items()} for pair in
            shorter_wins(10)]  # fmt: skip
    (tmp_path / "talk.json").write_text(json.dumps(talk))
    options = ["--data", tmp_path / "talk.json", "--max-length", 14, "--overlong", "truncate", "--steps", 1]
    code, _, err = run(capsys, *training(root, tmp_path / "out", *options))
    warnings = [line for line in err.splitlines() if line.startswith("nlhf-kernels: warning: preference: ")]
    assert code == 0 and "texts cut to 14 tokens" in warnings[0]


def test_an_output_that_exists_is_refused_and_replaced_on_request(root, tmp_path, capsys) -> None:
    save_preference_model(comparison_model(RewardModel), tmp_path / "out")
    code, _, err = run(capsys, *training(root, tmp_path / "out", "--steps", 1))
    assert code == 2 and "expected a folder that is not there yet; it is (--overwrite" in err
    assert isinstance(load_preference_model(tmp_path / "out"), RewardModel)
    assert run(capsys, *training(root, tmp_path / "out", "--steps", 1, "--overwrite"))[0] == 0
    assert not isinstance(load_preference_model(tmp_path / "out"), RewardModel)
    (tmp_path / "mine").mkdir()
    code, _, err = run(capsys, *training(root, tmp_path / "mine", "--steps", 1, "--overwrite"))
    assert code == 2 and "expected a preference model that this library wrote; got something else" in err


@pytest.mark.parametrize("moment", ["training", "saving"])
def test_an_interrupt_leaves_nothing(root, tmp_path, capsys, monkeypatch, moment) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    place, instead = {
        "training": ("training._backward", interrupt), "saving": ("storage.json", SimpleNamespace(dumps=interrupt))
    }[moment]  # fmt: skip
    monkeypatch.setattr(f"nlhf_kernels.preference.{place}", instead)
    code, out, err = run(capsys, *training(root, tmp_path / "out", "--steps", 2))
    assert code == 130 and not out and "interrupted: nothing was written" in err
    assert list(tmp_path.iterdir()) == []


WRONG = {
    "line 1: expected columns prompt, chosen, rejected; rejected is not among": {"--data": "@bad.jsonl"},
    "nothing.jsonl: there is no such file": {"--data": "@nothing.jsonl"},
    "prefer: --split: expected none": {"--split": "test"},
    "prefer: --base: there is no such folder": {"--base": "@nothing"},
    "expected tokenizer files; got a folder without": {"--base": "@weights_only"},
    "--template: expected {prompt}, {first}, {second}": {"--template": "@reward.txt"},
    "nothing: there is no such file": {"--template": "@nothing"},
    "prefer: --max-length: expected at most 128": {"--max-length": "1000"},
    "--batch-size: expected an integer": {"--batch-size": "0"},
    "prefer: --steps: expected an integer": {"--steps": "0"},
    "prefer: --micro-batch: expected an integer": {"--micro-batch": "9"},
    "prefer: --learning-rate: expected a finite number": {"--learning-rate": "nan"},
    "--seed: expected an integer": {"--seed": "-1"},
    "--test-fraction: expected a finite number": {"--test-fraction": "1.5"},
    "expected prompts for both sides": {"--test-fraction": "1"},
    "(--max-length 20); got": {"--max-length": "20", "--data": "@long.jsonl", "--test-fraction": "0"},
    "--device: expected a device": {"--device": "abacus"},
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_training_input_is_one_line(root, tmp_path, capsys, message) -> None:
    words = [part for pair in WRONG[message].items() for part in pair]
    words = [str(root / word[1:]) if word.startswith("@") else word for word in words]
    code, out, err = run(capsys, *training(root, tmp_path / "out", *words))
    assert code == 2 and not out and list(tmp_path.iterdir()) == []
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("nlhf-kernels: error: ") and message in lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a", "--first", "b"], "expected --prompt, --first and --second, or --file alone"),
        (["--prompt", "a", "--file", "@compare.jsonl"], "or --file alone"),
        (["--file", "@pairs.jsonl"], "line 1: expected columns prompt, first, second; first is not among"),
        (["--file", "@pairs.jsonl"], "(`prefer evaluate` measures on such pairs)"),
        (["--chat", "--file", "@compare.jsonl"], "--chat: expected with one pair; got --file"),
        (["--chat", "--prompt", "a", "--first", "b", "--second", "c"], "expected a tokenizer with a chat template"),
        (["--model", "@base", "--file", "@compare.jsonl"], "expected a folder with preference_model.json"),
        (["--model", "@nothing", "--file", "@compare.jsonl"], "--model: there is no such folder"),
        (["--model", "@broken", "--file", "@compare.jsonl"], "--model: cannot load a model from"),
        (["--file", "@compare.jsonl", "--output", "@no/where"], "expected a file in a folder that is there"),
        (["--file", "@compare.jsonl", "--batch-size", "0"], "--batch-size: expected an integer"),
        (["--prompt", " ", "--first", "b", "--second", "c"], "prompt: expected some text"),
    ],
)
def test_bad_scoring_input_is_one_line(root, capsys, options, message) -> None:
    words = [str(root / word[1:]) if word.startswith("@") else word for word in options]
    model = [] if "--model" in words else ["--model", root / "model"]
    code, out, err = run(capsys, "score", *model, *words, "--device", "cpu")
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 2 and not out
    assert len(lines) == 1 and lines[0].startswith("nlhf-kernels: error: ") and message in lines[0]


def test_missing_transformers_says_what_to_install(root, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, err = run(capsys, *training(root, tmp_path / "out"))
    assert code == 2 and err.count("\n") == 1 and 'pip install "nlhf-kernels[train]"' in err


def test_help_is_readable(capsys) -> None:
    parts = {"": "{train,evaluate,score}", "train": "one response was preferred", "score": "of one pair"}
    for word, part in (parts | {"evaluate": "Measure a trained model"}).items():
        with pytest.raises(SystemExit) as stop:
            main(["prefer", *word.split(), "--help"])
        assert stop.value.code == 0 and part in " ".join(capsys.readouterr().out.split())
