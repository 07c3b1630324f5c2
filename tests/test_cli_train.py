"""`nlhf-kernels train`: from a YAML file to a trained policy; unknown keys are refused with the nearest known one."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
import yaml

pytest.importorskip("accelerate", reason="training needs accelerate")

from nlhf_kernels.cli.main import main
from nlhf_kernels.preference import RewardModel, save_preference_model
from nlhf_kernels.train import NashConfig
from nlhf_kernels.train.config import FIXED, own_fields
from nlhf_kernels.train.config_page import COMMON, configuration_page
from nlhf_kernels.train.run_file import read_run_file
from tests.support.preference import comparison_model
from tests.support.tiny_models import tiny_model, tiny_tokenizer
from tests.support.training import PROMPTS, single_thread  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
JUDGE = """
def likes_e(prompts, first, second):
    return [0.5 + 0.1 * ('e' in a) - 0.1 * ('e' in b) for a, b in zip(first, second)]

def long(prompts, answers):
    return [float(len(answer)) for answer in answers]
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Models, judges and prompts in folders."""
    root = tmp_path_factory.mktemp("train")
    for name, seed in (("model", 0), ("other", 4)):
        tiny_model("llama", seed=seed).save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    (root / "columns.jsonl").write_text('{"question": "why"}\n')
    (root / "judge.py").write_text(JUDGE)
    save_preference_model(comparison_model(), root / "preference")
    save_preference_model(comparison_model(RewardModel), root / "reward")
    return root


@pytest.fixture
def config(root, tmp_path, monkeypatch):
    """A function that writes a valid run file with the given keys replaced."""
    monkeypatch.chdir(root)

    def write(**changes: object) -> str:
        training = {
            "output_dir": str(tmp_path / "run"), "max_steps": 2, "per_device_train_batch_size": 4, "max_new_tokens": 4,
            "use_cpu": True, "report_to": "none", "log_samples": 0, "seed": 3,
        }  # fmt: skip
        content = {
            "model": "model", "judge": {"function": "judge.py:likes_e"}, "data": {"train": "prompts.jsonl"},
            **changes, "training": {**training, **changes.get("training", {})},
        }  # fmt: skip
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
        return str(path)

    return write


#: A judge that records, when its process ends, which threads of the process group are still alive.
LAST_THREADS = """
import atexit, os
from pathlib import Path
from tests.support.train_run import thread_names

def group_threads() -> list:
    return [name for name in thread_names() if name.startswith("pt_gloo")]

atexit.register(lambda: Path(os.environ["RANK"] + ".threads").write_text(" ".join(group_threads())))

def likes_e(prompts, first, second):
    assert group_threads(), "else the test could not fail"
    return [0.5] * len(prompts)
"""


def train(*options: str) -> int:
    return main(["train", "--config", *options])


def test_a_run_leaves_a_policy_that_loads(config, tmp_path, capsys) -> None:
    data = {"train": "prompts.jsonl", "evaluation": "prompts.jsonl"}
    path = config(
        data=data, training={"save_steps": 1, "eval_prompts": 3, "learning_rate": 0.01}, eval_opponent="other"
    )
    assert train(path) == 0
    printed = capsys.readouterr().out
    assert "eval_win_rate_eval_opponent" in printed and f"Saved: {tmp_path / 'run' / 'policy'}" in printed
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy")
    assert not model.lm_head.weight.equal(tiny_model("llama").lm_head.weight)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "policy")) == 97
    assert train(path) == 2
    assert "training.output_dir: expected a folder without an earlier run; got" in capsys.readouterr().err
    assert train(path, "--resume", "--set", "training.max_steps=3") == 0
    assert (tmp_path / "run" / "checkpoint-3").is_dir()


@pytest.mark.parametrize(
    "judge",
    [
        {"preference_model": "preference", "batch_size": 2},
        {"reward_model": "reward", "scale": 2.0},
        [{"function": "judge.py:likes_e", "weight": 3}, {"preference_model": "preference"}],
    ],
    ids=["preference", "reward", "average"],
)
def test_judges(judge, config, capsys) -> None:
    path = config(judge=judge, lora={"r": 2, "target_modules": ["q_proj"]}, training={"max_steps": 1})
    assert train(path) == 0
    assert "Saved: " in capsys.readouterr().out


def test_rlhf_and_a_reference_of_its_own(config, tmp_path, capsys) -> None:
    for reward in ({"function": "judge.py:long"}, {"reward_model": "reward"}):
        path = config(judge=None, reward=reward, reference_model="other", training={"algorithm": "rlhf"})
        assert train(path, "--check") == 0
        assert "rlhf: 16 prompts, " in capsys.readouterr().out
        assert not any((tmp_path / "run").glob("*")), "a check leaves nothing"


def test_a_check_says_what_a_run_takes(config, tmp_path, capsys) -> None:
    data = {"train": "prompts.jsonl", "evaluation": "prompts.jsonl"}
    training = {"max_steps": 600, "eval_strategy": "steps", "eval_steps": 100, "save_steps": 10, "save_total_limit": 3}
    path = config(data=data, training=training)
    assert train(path, "--check", "--set", "training.beta=0.25") == 0
    output, hint = capsys.readouterr()
    assert re.search(r"^an update: [\d.]+ seconds; 600 of them$", output, re.M)
    assert re.search(r"^an evaluation: [\d.]+ seconds; 6 of them$", output, re.M)
    assert re.search(r"^memory: [\d.]+ [GM]iB, \d+ % of [\d.]+ GiB$", output, re.M)
    weights = sum(value.numel() for value in tiny_model("llama").parameters())
    three = 3 * 4 * (3 * weights) / 2**10  # weights, two moments
    (disk,) = re.findall(r"^disk: (\d+) KiB, 3 checkpoints of \d+ KiB$", output, re.M)
    assert float(disk) == pytest.approx(three, rel=0.01)
    assert output.endswith("ready\n") and "{" not in output
    assert f"Next: nlhf-kernels train --config {path} --set training.beta=0.25\n" in hint


def test_the_longest_prompts_are_what_is_tried(config, tmp_path, monkeypatch, capsys) -> None:
    rows = [{"prompt": "a" * length} for length in range(1, 21)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "asked.py").write_text(
        "asked = []\ndef judge(prompts, first, second):\n"
        "    open(__file__ + '.txt', 'a').write(' '.join(str(len(p)) for p in prompts) + '\\n')\n"
        "    return [0.5] * len(prompts)\n"
    )
    judge = {"function": f"{tmp_path / 'asked.py'}:judge"}
    path = config(data={"train": str(tmp_path / "long.jsonl")}, judge=judge, training={"num_train_epochs": 2,
                  "max_steps": -1})  # fmt: skip
    assert train(path, "--check") == 0
    assert "; 10 of them" in capsys.readouterr().out, "2 epochs of 20 prompts, 4 at once"
    requests = (tmp_path / "asked.py.txt").read_text().splitlines()
    assert [sorted(map(int, line.split())) for line in requests] == [[17, 18, 19, 20]] * 2


def test_a_stop_is_not_reported_as_finished(config, tmp_path, monkeypatch, capsys) -> None:
    """A run that a callback stops, as transformers' signal handler does, is not reported as finished."""
    from nlhf_kernels.train.callbacks import OptimizerHooks

    def stop(self, args, state, control, **_):
        control.should_training_stop = control.should_save = True

    monkeypatch.setattr(OptimizerHooks, "on_step_end", stop)
    assert train(config(training={"max_steps": 3})) != 0
    out, err = capsys.readouterr()
    assert "Saved" not in out and not (tmp_path / "run" / "policy").exists()
    assert "stopped after 1 of 3 updates, which is not the run's end: --resume goes on from " in err
    assert (tmp_path / "run" / "checkpoint-1").is_dir()


def test_an_error_is_the_last_line(config, capsys) -> None:
    """The progress bar is closed before the error is printed, and not drawn again below it."""
    path = config(judge={"function": "judge.py:long"}, training={"disable_tqdm": False})
    assert train(path) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("nlhf-kernels: error: judge judge.py:long: raised TypeError")


def test_what_to_do_next_is_shown(config, tmp_path, capsys) -> None:
    path = config(lora={"r": 2, "target_modules": ["q_proj"]}, training={"max_steps": 1})
    assert train(path) == 0
    policy = tmp_path / "run" / "policy"
    (first, *others) = [line.strip() for line in capsys.readouterr().err.splitlines() if "nlhf-kernels " in line]
    assert first == f"Next: nlhf-kernels sample --policy {policy} --text --prompt ..."
    compared = f"--policy before=model --policy after={policy} --judge judge.py:likes_e --data prompts.jsonl"
    assert others == [f"nlhf-kernels evaluate {compared}", f"nlhf-kernels merge {policy} --output {policy}-merged"]
    for line in (first.removeprefix("Next: "), *others):
        assert main([*shlex.split(line)[1:], "--device", "cpu"] if "merge" not in line else shlex.split(line)[1:]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": "x"}, "train: modle: no such key; the nearest is model"),
        ({"training": {"learning_rat": 1}}, "train: training.learning_rat: no such key; the nearest is learning_rate"),
        ({"training": {"betta": 1}}, "train: training.betta: no such key; the nearest is beta"),
        ({"training": {"zzzzzzz": 1}}, "train: training.zzzzzzz: no such key"),
        ({"judge": {"functoin": "x"}}, "train: judge.functoin: no such key; the nearest is function"),
        ({"judge": [{"function": "judge.py:likes_e"}, {"modle": 1}]}, r"train: judge\[1\].modle: no such key"),
        ({"data": {"trian": "x"}}, "train: data.trian: no such key; the nearest is train"),
        ({"lora": {"rank": 4}}, "train: lora.rank: no such key"),
        ({"model": 7}, "train: model: expected str; got 7"),
        ({"model": None}, "train: model: expected a value; got none"),
        ({"data": "prompts.jsonl"}, "train: data: expected keys and values; got 'prompts.jsonl'"),
        ({"data": {"evaluation": "x"}}, "train: data.train: expected a value; got none"),
        ({"judge": {}}, "train: judge: expected one of preference_model, reward_model, function; got none"),
        ({"judge": []}, "train: judge: expected at least one; got an empty list"),
        ({"judge": {"function": "judge.py:likes_e", "scale": 2.0}}, "train: judge.scale: expected with reward_model"),
        ({"judge": {"function": "judge.py:nobody"}}, "train: judge.function: cannot load 'judge.py:nobody'"),
        ({"judge": {"function": "nowhere.py:x"}}, "train: judge.function: cannot load .*: there is no such file"),
        ({"judge": {"function": "likes_e"}}, "train: judge.function: expected module:name or file.py:name"),
        ({"judge": {"reward_model": "preference"}}, "train: judge.reward_model: expected another kind of model"),
        ({"judge": {"preference_model": "model"}}, "train: judge.preference_model: cannot load a model from 'model'"),
        ({"judge": None}, "train: judge: expected one, for nash-md; got None"),
        ({"dtype": "fp8"}, "train: dtype: expected one of float32, bfloat16, auto; got 'fp8'"),
        ({"model": "./nowhere"}, "train: model: there is no such folder: './nowhere'"),
        ({"data": {"train": "columns.jsonl"}}, "train: data.train: columns.jsonl, line 1: expected columns prompt"),
        ({"data": {"train": "prompts.jsonl", "train_split": "x"}}, "train: data.train_split: expected none"),
        ({"data": {"train": "none.jsonl"}}, "train: data.train: none.jsonl: there is no such file"),
        ({"training": {"output_dir": ""}}, "train: training: expected output_dir among its keys; got none"),
        ({"training": {"learning_rate": "fast"}}, "train: training.learning_rate: expected float; got 'fast'"),
        ({"training": {"max_steps": 1.5}}, "train: training.max_steps: expected int; got 1.5"),
        ({"training": {"bf16": "yes please"}}, "train: training.bf16: expected bool; got 'yes please'"),
        ({"training": {"beta": 2.0}}, r"train: training.beta: expected a finite number in \[0.0, 1.0\]; got 2.0"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(changes, message, config, capsys) -> None:
    assert train(config(**changes)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert re.match(f"nlhf-kernels: error: {message}", line), line


def test_files_that_are_no_run(tmp_path, capsys) -> None:
    path = tmp_path / "run.yaml"
    for text, message in (
        (None, "run.yaml: there is no such file"),
        ("- a\n", "expected keys and values; got list"),
        ("model: [", "expected YAML: "),
        ("model: a\nmodel: b\n", "'model' is there twice"),
    ):
        if text is not None:
            path.write_text(text)
        assert train(str(path)) == 2
        assert message in capsys.readouterr().err
    path.write_text("model: a\n")
    assert train(str(path), "--set", "training") == 2
    assert "--set: expected key=value, as in training.beta=0.25; got 'training'" in capsys.readouterr().err
    assert train(str(path), "--set", "model.x=1") == 2
    assert "--set: model.x: expected keys and values at model" in capsys.readouterr().err


def test_every_field_of_nash_config_can_be_written(tmp_path) -> None:
    """Every field of NashConfig is accepted with its default as YAML; lists and mappings also by --set."""
    config = NashConfig(str(tmp_path))
    by_name = {field.name for field in dataclasses.fields(NashConfig)}
    values = {name: value for name, value in config.to_dict().items() if name in by_name}
    assert len(values) > 100
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": "m", "data": {"train": "d"}, "training": values}))
    run = read_run_file(path, ["training.beta=[0.1, 0.2]", "training.tau={0: 1e-2, 5: 2e-3}", "judge.function=a:b"])
    assert run.config().beta == [0.1, 0.2] and run.config().tau == {0: 0.01, 5: 0.002}
    assert run.judge[0].function == "a:b"


@pytest.mark.files
def test_the_example_runs(root, tmp_path, monkeypatch, capsys) -> None:
    """The printed example runs with a tiny model in place of its own, and has no unknown key."""
    assert main(["train", "--example"]) == 0
    path = tmp_path / "run.yaml"
    path.write_text(capsys.readouterr().out)
    run = read_run_file(path, ["training.use_cpu=true"])
    assert run.config().learning_rate == 1e-6 and run.judge is not None and run.dtype == "float32"
    changes = {
        "model": "model", "judge.preference_model": "preference", "data.train": "prompts.jsonl",
        "data.evaluation": "prompts.jsonl", "training.output_dir": tmp_path / "run", "training.max_steps": 1,
        "training.max_prompt_length": 16, "training.max_new_tokens": 4, "training.bf16": "false",
        "training.use_cpu": "true", "training.per_device_train_batch_size": 4, "training.eval_prompts": 2,
        "training.report_to": "none",
    }  # fmt: skip
    words = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    monkeypatch.chdir(root)
    assert train(str(path), *words) == 0
    assert f"Saved: {tmp_path / 'run' / 'policy'}" in capsys.readouterr().out


def test_a_page_of_aliases_is_not_written_out(tmp_path, capsys) -> None:
    """Nested aliases of a billion values (nine levels of nine) are refused without printing them all."""
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    path = tmp_path / "run.yaml"
    path.write_text("\n".join(levels) + "\nmodel: *a8\n")
    assert train(str(path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "expected at most 10000 values; got" in line and "every alias written out" in line
    path.write_text("a: &a [*a]\n")
    assert train(str(path)) == 2
    assert "an alias that holds itself" in capsys.readouterr().err
    path.write_text("\n".join(levels[:4]) + "\nmodel: *a3\n")  # few enough: shown short
    assert train(str(path)) == 2
    assert len(capsys.readouterr().err) < 300


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: " + "[" * 5000, "expected YAML: "),
        ("model: " + "9" * 5000, "expected YAML: "),
        ("model: 2026-99-99", "expected YAML: "),
        ("? [a, b]\n: c", "expected YAML: "),
        ("model: !!python/object/apply:os.system [id]", "expected YAML: "),
        ("model: " + "x" * 100_000 + "\nnonsense: 1", "train: nonsense: no such key"),
        ("nonsense" * 100 + ": 1", "no such key"),
        ("model: m\ndata: " + "x" * 100_000, "train: data: expected keys and values; got 'xxx"),
    ],
)
def test_files_that_are_hardly_yaml_are_one_short_line(text, message, tmp_path, capsys) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("\ufeff" + text)
    assert train(str(path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and len(line) < 1000


def test_the_configuration_page_is_current(capsys) -> None:
    assert main(["train", "--keys"]) == 0
    page = capsys.readouterr().out
    assert page == configuration_page() == (ROOT / "docs" / "configuration.md").read_text(), (
        "nlhf-kernels train --keys > docs/configuration.md"
    )
    for name in [field.name for field in own_fields()] + list(FIXED):
        assert f"| `{name}` |" in page
    assert set(COMMON) <= {field.name for field in dataclasses.fields(NashConfig)}


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are read from /proc")
def test_processes_of_a_launcher_end_without_threads_of_their_group(config, root, tmp_path) -> None:
    """No thread of the process group is left: one that frees a tensor at shutdown can abort its process."""
    (root / "last_threads.py").write_text(LAST_THREADS)
    data = {"train": "prompts.jsonl", "evaluation": "prompts.jsonl"}
    training = {"max_steps": 1, "ddp_backend": "gloo", "eval_prompts": 2}
    path = config(judge={"function": "last_threads.py:likes_e"}, data=data, training=training)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launch, "-m", "nlhf_kernels", "train", "--config", path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Saved: ") == 1, "the first process speaks for all"
    assert [(root / f"{rank}.threads").read_text() for rank in (0, 1)] == ["", ""]
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy") is not None
