"""Interrupted training of a preference model: resuming gives the uninterrupted result, to the last bit."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nlhf_kernels.cli.main import main
from nlhf_kernels.preference import PreferenceTraining, RewardModel, load_preference_model, train_preference_model
from nlhf_kernels.preference import training as module
from tests.support.preference import comparison_model, shorter_wins
from tests.support.tiny_models import one_thread, tiny_model, tiny_tokenizer

SETTINGS = PreferenceTraining(steps=9, batch_size=4, learning_rate=1e-3, seed=3)
PAIRS = shorter_wins(10)  # an epoch ends within a step


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def train(path: Path | None, settings: PreferenceTraining = SETTINGS, pairs=PAIRS, every: int = 2, model=None):
    model = model or comparison_model(architecture="gpt2")  # has dropout
    report = train_preference_model(model, pairs, settings, progress=False, checkpoint=path, checkpoint_every=every)
    return model, report.losses


def cut_off(path: Path, monkeypatch, after: int) -> None:
    """Interrupt training in its step number `after`."""
    calls, step = [], module._backward

    def stop(*arguments):
        calls.append(None)
        if len(calls) > after:
            raise KeyboardInterrupt
        return step(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(module, "_backward", stop)
        with pytest.raises(KeyboardInterrupt):
            train(path)


@pytest.mark.parametrize("after", [1, 2, 5, 8])
def test_going_on_is_never_having_stopped(after, tmp_path, monkeypatch) -> None:
    straight, losses = train(None)
    cut_off(tmp_path / "run", monkeypatch, after)
    assert (tmp_path / "run").exists() is (after >= 2)
    torch.manual_seed(after)
    resumed, again = train(tmp_path / "run")
    assert again == losses and len(losses) == 9
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "nothing else is left"
    _, second_losses = train(tmp_path / "run")
    assert second_losses == losses, "a finished training is not trained again"


def test_fewer_pairs_at_once_may_go_on(tmp_path, monkeypatch) -> None:
    cut_off(tmp_path / "run", monkeypatch, 4)
    lower = dataclasses.replace(SETTINGS, micro_batch=1)
    assert len(train(tmp_path / "run", lower)[1]) == 9


def test_a_checkpoint_of_something_else_is_refused(tmp_path, monkeypatch) -> None:
    cut_off(tmp_path / "run", monkeypatch, 4)
    before = (tmp_path / "run").read_bytes()
    other, nudged = dataclasses.replace(SETTINGS, learning_rate=2e-3), comparison_model(architecture="gpt2")
    with torch.no_grad():
        next(nudged.body.parameters()).add_(1e-3)
    for message, arguments in (
        ("a checkpoint of this training; its learning_rate is 0.001, here 0.002", {"settings": other}),
        (".* its tokens of the pairs is '.*', here '", {"pairs": PAIRS[::-1]}),
        (".* its kind is 'pairwise', here 'reward'", {"model": comparison_model(RewardModel, "gpt2")}),
        (".* its start is '.*', here '", {"model": comparison_model(architecture="llama")}),
        (".* its start is '.*', here '", {"model": nudged}),
    ):
        with pytest.raises(ValueError, match=f"checkpoint: .*run: expected {message}"):
            train(tmp_path / "run", **arguments)
    assert (tmp_path / "run").read_bytes() == before
    (tmp_path / "run").write_bytes(before[: len(before) // 2])
    with pytest.raises(ValueError, match="checkpoint: expected a file that it wrote; got .*run"):
        train(tmp_path / "run")
    turned = bytearray(before)
    turned[-3] ^= 1
    (tmp_path / "run").write_bytes(turned)
    with pytest.raises(ValueError, match="run: expected the CRC-32 of what was written; got another: the file is dam"):
        train(tmp_path / "run")
    for place in (tmp_path, tmp_path / "no" / "where"):
        with pytest.raises(ValueError, match="checkpoint: expected a file in a folder that is there"):
            train(place)
    with pytest.raises(ValueError, match="checkpoint_every: expected an integer"):
        train(None, every=0)


KILLED = """
import os, signal, sys, torch
torch.set_num_threads(1)
from nlhf_kernels.preference import training
from nlhf_kernels.cli.main import main
step, calls = training._backward, []
def die(*arguments):
    calls.append(None)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*arguments)
training._backward = die
main(sys.argv[1:])
"""


def test_killed_and_called_again(tmp_path, capsys) -> None:
    for part in (tiny_model("gpt2"), tiny_tokenizer()):
        part.save_pretrained(tmp_path / "base")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair._asdict()) + "\n" for pair in shorter_wins(20)))
    (tmp_path / "template").write_text("{prompt}|{first}|{second}=")
    words = ["prefer", "train", "--data", "pairs.jsonl", "--base", "base", "--template", "template", "--steps", "6",
             "--batch-size", "4", "--learning-rate", "1e-3", "--device", "cpu", "--json"]  # fmt: skip
    words = [str(tmp_path / word) if (tmp_path / word).exists() else word for word in words]
    keeping = ["--checkpoint", str(tmp_path / "run"), "--checkpoint-every", "2"]
    assert main([*words, "--output", str(tmp_path / "straight")]) == 0
    straight = json.loads(capsys.readouterr().out)
    killed = [*words, *keeping, "--output", str(tmp_path / "killed")]
    code = subprocess.run([sys.executable, "-c", KILLED, *killed], capture_output=True).returncode
    assert code == -signal.SIGKILL and (tmp_path / "run").exists() and not (tmp_path / "killed").exists()
    assert main(killed) == 0
    resumed = json.loads(capsys.readouterr().out)
    assert resumed == straight | {"output": str(tmp_path / "killed")} and len(resumed["losses"]) == 6
    assert not (tmp_path / "run").exists(), "gone once the model is saved"
    one, two = (load_preference_model(tmp_path / name) for name in ("straight", "killed"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_the_commands_checkpoint_on_interrupt_and_misuse(tmp_path, capsys, monkeypatch) -> None:
    for part in (tiny_model("gpt2"), tiny_tokenizer()):
        part.save_pretrained(tmp_path / "base")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair._asdict()) + "\n" for pair in shorter_wins(20)))
    (tmp_path / "template").write_text("{prompt}|{first}|{second}=")
    words = ["prefer", "train", "--data", str(tmp_path / "pairs.jsonl"), "--base", str(tmp_path / "base"), "--device",
             "cpu", "--output", str(tmp_path / "out"), "--template", str(tmp_path / "template")]  # fmt: skip
    assert main([*words, "--checkpoint-every", "2"]) == 2
    assert "--checkpoint-every: expected with --checkpoint" in capsys.readouterr().err

    def interrupt(*_: object, **__: object) -> None:
        (tmp_path / "run").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_backward", interrupt)
    assert main([*words, "--checkpoint", str(tmp_path / "run")]) == 130
    assert f"interrupted: the same command goes on from {tmp_path / 'run'}" in capsys.readouterr().err
