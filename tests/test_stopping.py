"""SIGTERM: the update is finished or abandoned, a checkpoint written, the exit code 143, the run left unfinished."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
import transformers

pytest.importorskip("accelerate", reason="training needs accelerate")

from nlhf_kernels.cli.main import main
from nlhf_kernels.core import stopping
from nlhf_kernels.core.stopping import Stopped, abandonable, deferred, stoppable
from nlhf_kernels.experiment import pipeline
from nlhf_kernels.preference import training as preference_training
from tests.support.preference import shorter_wins
from tests.support.tiny_models import tiny_model, tiny_tokenizer
from tests.support.training import history, likes_e, make_trainer, single_thread  # noqa: F401

RUN = {"max_steps": 5, "save_strategy": "steps", "save_steps": 100, "learning_rate": 1e-2}
LOGGED = ("loss", "grad_norm", "kl", "preference", "length", "learning_rate")


def terminate(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class TerminateInUpdate(transformers.TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **_) -> None:
        if state.global_step == 2:
            terminate()


def test_blocks() -> None:
    said = []
    with pytest.raises(Stopped) as caught, stoppable():
        with deferred():
            terminate()
            said.append("deferred")
            with pytest.raises(Stopped), abandonable():
                said.append("never")
        stopping.stop_if_requested()
    assert said == ["deferred"] and caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and not stopping.requested()
    with pytest.raises(Stopped), stoppable(), deferred(), abandonable():
        terminate()
    own = signal.signal(signal.SIGTERM, lambda *_: said.append("own"))
    with stoppable():
        terminate()
    signal.signal(signal.SIGTERM, own)
    assert said[-1] == "own", "a handler that is there stays"


@pytest.mark.parametrize("moment", ["answers", "update", "evaluation"])
def test_a_stopped_training_goes_on_as_if_it_had_not_been(moment, tmp_path, caplog) -> None:
    """A stopped and resumed training equals an uninterrupted one, also after an abandoned evaluation."""
    asked = [0]

    def judge(prompts, first, second):
        asked[0] += 1
        if moment != "update" and asked[0] == (3 if moment == "answers" else 4):
            terminate()
        return likes_e(prompts, first, second)

    options = {**RUN, "judge": judge}
    if moment == "evaluation":  # after the third update
        options |= {"eval_dataset": [{"prompt": "say e"}], "eval_strategy": "steps", "eval_steps": 3}
    callbacks = [TerminateInUpdate()] if moment == "update" else []
    stopped = make_trainer(tmp_path / "stopped", callbacks=callbacks, **options)
    with pytest.raises(Stopped):
        stopped.train()
    steps = {"answers": 2, "update": 3, "evaluation": 3}[moment]
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == [f"checkpoint-{steps}"]
    resumed = make_trainer(tmp_path / "stopped", **options)
    resumed.train(resume_from_checkpoint=True)
    straight = make_trainer(tmp_path / "straight", **options)
    straight.train()
    assert history(resumed, *LOGGED) == history(straight, *LOGGED) and len(history(resumed, "loss")) == 5
    for name, value in straight.model.named_parameters():
        assert dict(resumed.model.named_parameters())[name].equal(value), name


def test_a_reward_that_is_asked_meanwhile_has_done_nothing_wrong(tmp_path) -> None:
    def reward(prompts, answers):
        terminate()
        return [0.0 for _ in answers]

    with pytest.raises(Stopped):
        make_trainer(tmp_path, judge=None, reward=reward, algorithm="rlhf", **RUN).train()


def test_the_last_update_is_no_finished_run(tmp_path) -> None:
    trainer = make_trainer(tmp_path, **{**RUN, "max_steps": 3}, callbacks=[TerminateInUpdate()])
    with pytest.raises(Stopped):
        trainer.train()
    again = make_trainer(tmp_path, **{**RUN, "max_steps": 3})
    assert again.train(resume_from_checkpoint=True).global_step == 3


def test_where_nothing_is_saved_nothing_is(tmp_path) -> None:
    with pytest.raises(Stopped):
        make_trainer(tmp_path, **{**RUN, "save_strategy": "no"}, callbacks=[TerminateInUpdate()]).train()
    assert list(tmp_path.iterdir()) == []


def test_the_commands_say_so(tmp_path, capsys, monkeypatch) -> None:
    for part in (tiny_model("gpt2"), tiny_tokenizer()):
        part.save_pretrained(tmp_path / "base")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair._asdict()) + "\n" for pair in shorter_wins(20)))
    (tmp_path / "template").write_text("{prompt}|{first}|{second}=")
    monkeypatch.chdir(tmp_path)
    words = ["prefer", "train", "--data", "pairs.jsonl", "--base", "base", "--template", "template", "--steps", "6",
             "--batch-size", "4", "--learning-rate", "1e-3", "--device", "cpu", "--json"]  # fmt: skip
    assert main([*words, "--output", "straight"]) == 0
    straight = json.loads(capsys.readouterr().out)
    step, calls = preference_training._backward, []

    def stopping_step(*arguments):
        calls.append(None)
        if len(calls) == 4:
            terminate()
        return step(*arguments)

    monkeypatch.setattr(preference_training, "_backward", stopping_step)
    kept = [*words, "--output", "stopped", "--checkpoint", "run"]
    assert main(kept) == 143
    captured = capsys.readouterr()
    assert "stopped by SIGTERM: the same command goes on from run" in captured.err and not captured.out
    assert (tmp_path / "run").is_file() and not (tmp_path / "stopped").exists()
    assert main(kept) == 0
    assert json.loads(capsys.readouterr().out) == straight | {"output": "stopped"}
    monkeypatch.setattr(pipeline, "make_corpus", terminate)
    assert main(["demo", "--task", "texts", "--preset", "tiny", "--out", "demo", "--device", "cpu"]) == 143
    assert "stopped by SIGTERM: no stage was finished" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["experiment.json"]
    assert torch.get_num_threads() == 1
