"""Durability of run files: users' own files, power failures, bit rot, two runs at once."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path

import pytest
import yaml

pytest.importorskip("accelerate", reason="training needs accelerate")

from nlhf_kernels.cli.main import main
from nlhf_kernels.core import lock, manifest
from nlhf_kernels.core.lock import InUseError, lock_folder
from nlhf_kernels.preference import load_preference_model, save_preference_model
from tests.support.preference import comparison_model, shorter_wins
from tests.support.tiny_models import tiny_model, tiny_tokenizer
from tests.support.training import PROMPTS, history, make_trainer, single_thread  # noqa: F401

RUN = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """Write a model, prompts, pairs, a preference model and a run file; return the working folder."""
    for part in (tiny_model("llama"), tiny_tokenizer()):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair._asdict()) + "\n" for pair in shorter_wins(20)))
    (tmp_path / "judge.py").write_text("def judge(prompts, first, second):\n    return [0.4 for _ in prompts]\n")
    training = {"output_dir": "out", "max_steps": 2, "per_device_train_batch_size": 4, "max_new_tokens": 4,
                "use_cpu": True, "report_to": "none", "log_samples": 0, "save_strategy": "no"}  # fmt: skip
    plan = {"model": "model", "judge": {"function": "judge.py:judge"}, "data": {"train": "prompts.jsonl"},
            "training": training}  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(plan))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*options: str) -> int:
    return main(["train", "--config", "run.yaml", *options])


def held(place: Path, hold=lock_folder) -> int:
    """Start a process that holds the lock of a path; return its process id."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        with hold(place):
            os.write(write, b"held")
            signal.pause()
    assert os.read(read, 4) == b"held"
    return process


def flip(path: Path) -> None:
    """Invert one bit in the middle of the file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_train_leaves_a_folder_called_policy_alone(root, capsys) -> None:
    (root / "out" / "policy").mkdir(parents=True)
    (root / "out" / "policy" / "insurance.py").write_text("source code")
    for options in ([], ["--resume"], ["--set", "training.overwrite_output_dir=true"]):
        assert train(*options) == 2
        assert "out/policy: " in capsys.readouterr().err
    assert (root / "out" / "policy" / "insurance.py").read_text() == "source code"


def test_a_second_round_does_not_overwrite_its_start(root, capsys) -> None:
    assert train() == 0
    before = manifest.checksum_of(root / "out" / "policy" / "model.safetensors")
    capsys.readouterr()
    again = ["--set", "training.overwrite_output_dir=true"]
    for name in ("model", "reference_model", "eval_opponent", "tokenizer"):
        assert train(*again, "--set", f"{name}=out/policy") == 2
        assert f"train: {name}: expected a folder that this run does not replace; got out/policy" in (
            capsys.readouterr().err
        )
    (root / "adapters").mkdir()
    (root / "adapters" / "adapter_config.json").write_text('{"base_model_name_or_path": "out/policy"}')
    assert train(*again, "--set", "model=adapters") == 2
    assert "got adapters" in capsys.readouterr().err
    assert train() == 2
    assert "expected a folder without an earlier run; got one that holds out/policy" in capsys.readouterr().err
    assert manifest.checksum_of(root / "out" / "policy" / "model.safetensors") == before
    (root / "out" / "policy" / "notes.txt").write_text("mine")
    assert train(*again) == 2
    assert "expected only what this library wrote; got notes.txt" in capsys.readouterr().err
    (root / "out" / "policy" / "notes.txt").unlink()
    assert train(*again) == 0
    manifest.verify(root / "out" / "policy")


def test_overwriting_removes_this_trainers_checkpoints_alone(tmp_path) -> None:
    make_trainer(tmp_path, **{**RUN, "max_steps": 4}).train()
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-9" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"expected a folder without checkpoints; got .*checkpoint-9 in it"):
        make_trainer(tmp_path, **RUN, overwrite_output_dir=True).train()
    (tmp_path / "checkpoint-9").rename(tmp_path / "notes")
    make_trainer(tmp_path, **{**RUN, "max_steps": 2}, overwrite_output_dir=True).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "notes"]


def test_rotation_counts_and_removes_its_own_only(tmp_path) -> None:
    (tmp_path / "checkpoint-1b").mkdir()
    (tmp_path / "checkpoint-old").mkdir()
    make_trainer(tmp_path, **RUN, save_total_limit=1).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1b", "checkpoint-6", "checkpoint-old"]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json", "nash_run.json"])
def test_a_flipped_bit_is_named_and_the_checkpoint_before_is_taken(file, tmp_path, caplog) -> None:
    straight = make_trainer(tmp_path, **RUN)
    straight.train()
    flip(tmp_path / "checkpoint-6" / file)
    (tmp_path / "checkpoint-4" / file).write_bytes(b"")  # what a power failure leaves of an unsynced file
    resumed = make_trainer(tmp_path, **RUN)
    resumed.train(resume_from_checkpoint=True)
    assert f"checkpoint-6/{file}: expected the CRC-32" in caplog.text
    assert f"checkpoint-4/{file}: expected" in caplog.text and "put aside as checkpoint-4.damaged" in caplog.text
    assert len(history(resumed, "loss")) == 6 and (tmp_path / "checkpoint-6.damaged").is_dir()
    assert history(resumed, "loss", "kl") == history(straight, "loss", "kl")
    manifest.verify(tmp_path / "checkpoint-6")
    flip(tmp_path / "checkpoint-2" / file)
    with pytest.raises(ValueError, match=rf"expected a complete checkpoint; .*checkpoint-2/{file}: expected the CRC"):
        make_trainer(tmp_path, **RUN).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_saved_model_with_a_flipped_bit_judges_nothing(tmp_path) -> None:
    save_preference_model(comparison_model(), tmp_path / "model")
    flip(tmp_path / "model" / "body" / "model.safetensors")
    with pytest.raises(ValueError, match=r"body/model.safetensors: expected the CRC-32 .* of what was written; got"):
        load_preference_model(tmp_path / "model")


def test_a_policy_with_a_flipped_bit_is_not_loaded(root, capsys) -> None:
    assert train() == 0
    flip(root / "out" / "policy" / "model.safetensors")
    assert main(["sample", "--policy", "out/policy", "--prompt", "a", "--max-new-tokens", "2"]) == 2
    assert "out/policy/model.safetensors: expected the CRC-32" in capsys.readouterr().err


def test_a_second_run_in_the_folder_ends_at_once(root, capsys, monkeypatch) -> None:
    (root / "out").mkdir()
    process = held(root / "out")
    try:
        monkeypatch.setattr("nlhf_kernels.cli.train.build", lambda *_: pytest.fail("models were loaded"))
        assert train() == 2
        assert f"out: expected a place that no other run writes to; process {process} on" in capsys.readouterr().err
        with pytest.raises(InUseError, match=f"process {process}"):
            make_trainer(root / "out", **RUN).train()
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    assert [path.name for path in (root / "out").iterdir()] == [lock.NAME]
    make_trainer(root / "out", **{**RUN, "max_steps": 2}).train()
    assert [path.name for path in (root / "out").iterdir()] == ["checkpoint-2"]


def test_two_trainings_of_a_preference_model_do_not_meet(root, capsys, monkeypatch) -> None:
    words = ["prefer", "train", "--data", "pairs.jsonl", "--base", "model", "--output", "out", "--device", "cpu"]
    monkeypatch.setattr("nlhf_kernels.cli.prefer._train_and_save", lambda *_: pytest.fail("models were loaded"))
    for place, options in (("out", []), ("checkpoint", ["--checkpoint", "checkpoint"])):
        process = held(root / place, lock.lock_place)
        try:
            assert main([*words, *options]) == 2
            assert (
                f"{place}: expected a place that no other run writes to; process {process}" in capsys.readouterr().err
            )
        finally:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


def test_two_experiments_do_not_meet(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("nlhf_kernels.experiment.pipeline.make_corpus", lambda *_: pytest.fail("a stage was made"))
    (tmp_path / "out").mkdir()
    process = held(tmp_path / "out")
    try:
        assert (
            main(["demo", "--task", "texts", "--preset", "tiny", "--out", str(tmp_path / "out"), "--device", "cpu"])
            == 2
        )
        assert f"out: expected a place that no other run writes to; process {process}" in capsys.readouterr().err
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_a_full_disk_ends_a_training_with_one_sentence(root, capfd, strategy) -> None:
    """The disk fills while the policy or a checkpoint is written; a limit on file sizes simulates it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard))
    try:
        code = train("--set", f"training.save_strategy='{strategy}'", "--set", "training.save_steps=1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    line = capfd.readouterr().err.strip().splitlines()[-1]
    place = {"no": root / "out" / "policy", "steps": "out/checkpoint-1"}[strategy]
    assert code == 1, line
    assert f"nlhf-kernels: error: train: {place}: cannot be written: the limit on a file's size is re" in line
    assert list((root / "out").iterdir()) == [], "nothing half-written, no lock"


def test_output_files_keep_their_mode_and_streams_are_written_to(root, capsys) -> None:
    save_preference_model(comparison_model(), root / "judge")
    score = ["prefer", "score", "--model", "judge", "--prompt", "a", "--first", "b", "--second", "c", "--device", "cpu"]
    (root / "private").touch(0o600)
    assert main([*score, "--output", "private"]) == 0
    assert "P(first" in (root / "private").read_text() and (root / "private").stat().st_mode & 0o777 == 0o600
    capsys.readouterr()
    for stream in ("-", "/dev/stdout"):
        assert main([*score, "--output", stream]) == 0
        assert capsys.readouterr().out == (root / "private").read_text()
    assert main([*score, "--output", "/dev/null"]) == 0 and Path("/dev/null").is_char_device()
    for place in (root, root / "no" / "where"):
        assert main([*score, "--output", str(place)]) == 2
        assert "error: prefer: --output: " in capsys.readouterr().err
