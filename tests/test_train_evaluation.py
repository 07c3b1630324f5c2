"""Reports of a run: evaluations, logs, sample tables, the progress bar, and steps that are not finite."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

pytest.importorskip("accelerate", reason="training needs accelerate")

from nlhf_kernels.core.terminal import new_console
from nlhf_kernels.train import samples
from nlhf_kernels.train.callbacks import Progress, log_lines, speed_line
from nlhf_kernels.train.meters import PHASES
from tests.support.tiny_models import tiny_model
from tests.support.training import LetterGame, counted, history, likes_e, make_trainer, single_thread  # noqa: F401

PROMPTS = [{"prompt": f"say {letter}"} for letter in "abcde"]
MEASURED = {"kl", "entropy", "length", "end_rate", "win_rate_reference"}


def evaluated(trainer) -> dict[str, float]:
    return {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}


def test_a_policy_that_is_its_reference_has_no_kl_and_wins_half(tmp_path) -> None:
    game = LetterGame()
    trainer = make_trainer(
        tmp_path, model=game.model(), judge=game.judge, tokenizer=game.tokenizer(), max_new_tokens=1,
        train_dataset=[{"prompt": "a"}] * 16, eval_dataset=[{"prompt": "a"}] * 4, eval_samples_per_prompt=512,
    )  # fmt: skip
    result = evaluated(trainer)
    assert result.keys() == MEASURED | {"epoch"}
    logs = game.log_probabilities(trainer.model)
    assert result["kl"] == pytest.approx(0, abs=1e-5)
    assert result["win_rate_reference"] == pytest.approx(0.5, abs=0.03), "2048 answers: 3 standard errors"
    with torch.no_grad():
        every = trainer.model(input_ids=torch.tensor([[3]])).logits[0, -1].double().log_softmax(-1)
    assert result["entropy"] == pytest.approx(-float((every.exp() * every).sum()), abs=0.1)
    assert result["length"] == 1.0
    assert result["end_rate"] == pytest.approx(float(every[2].exp()), abs=0.05)
    assert float(logs.exp().sum()) == pytest.approx(1.0)


def test_evaluation_sees_what_was_learned_and_draws_the_same_noise(tmp_path) -> None:
    options = {"learning_rate": 2e-2, "max_steps": 12, "eval_strategy": "steps", "eval_steps": 6, "tau": 0.0}
    trainer = make_trainer(
        tmp_path, eval_dataset=PROMPTS, eval_samples_per_prompt=8, eval_on_start=True, samples_per_prompt=8, **options
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "eval_kl" in entry]
    assert [entry["step"] for entry in log] == [0, 6, 12]
    assert log[0]["eval_kl"] == pytest.approx(0, abs=1e-4) and log[-1]["eval_kl"] > 0.1
    assert log[-1]["eval_win_rate_reference"] > log[0]["eval_win_rate_reference"] + 0.05
    assert evaluated(trainer) == evaluated(trainer)


def test_rivals_that_do_not_change_answer_once(tmp_path) -> None:
    judge, calls = counted(likes_e)
    trainer = make_trainer(
        tmp_path, judge=judge, eval_dataset={"seen": PROMPTS, "new": PROMPTS[:2]}, per_device_eval_batch_size=2,
        eval_opponent=tiny_model("llama", seed=9), algorithm="nash-ema",
    )  # fmt: skip
    runs = []
    inside = trainer.engine.rollout
    trainer.engine.rollout = lambda *a, **k: runs.append(a[2]) or inside(*a, **k)
    first = trainer.evaluate()
    assert len(runs) == 4 * 2, "3 batches of one set, 1 of the other, policy with opponent and reference apart"
    assert sum(calls) == 3 * (5 + 2), "reference, saved opponent, opponent"
    again = trainer.evaluate()
    assert len(runs) == 4 * 3, "the reference's answers are kept"
    assert first == again
    rivals = {f"eval_{part}_win_rate_{who}" for part in ("seen", "new") for who in ("reference", "eval_opponent")}
    assert rivals < first.keys()


def test_a_reward_is_evaluated_beside_the_judge(tmp_path) -> None:
    reward = {"judge": None, "reward": lambda prompts, answers: [float(len(answer)) for answer in answers]}
    result = evaluated(make_trainer(tmp_path / "1", eval_dataset=PROMPTS, algorithm="rlhf", **reward))
    assert result["reward"] > 0 and "win_rate_reference" not in result
    both = make_trainer(tmp_path / "2", eval_dataset=PROMPTS, eval_prompts=2, reward=reward["reward"])
    assert {"reward", "reward_reference", "win_rate_reference"} < evaluated(both).keys()
    assert len(both.evaluation_prompts) == 2


@pytest.mark.parametrize("algorithm", ["nash-md", "nash-ema", "rlhf"])
def test_the_metrics_names_are_known_before(algorithm, tmp_path) -> None:
    """metric_for_best_model is checked against them."""
    trainer = make_trainer(
        tmp_path, algorithm=algorithm, eval_dataset=PROMPTS[:2], reward=lambda prompts, answers: [1.0] * len(answers),
        eval_opponent=tiny_model("llama", seed=9),
    )  # fmt: skip
    assert {f"eval_{name}" for name in trainer.evaluator.metric_names()} == set(trainer.evaluate()) - {"epoch"}


def test_evaluation_sets_in_a_dataset_dict(tmp_path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {"seen": datasets.Dataset.from_list(PROMPTS), "new": datasets.Dataset.from_list(PROMPTS[:2])}
    trainer = make_trainer(tmp_path, eval_dataset=datasets.DatasetDict(parts), max_new_tokens=2)
    assert {name: len(part) for name, part in trainer.eval_dataset.items()} == {"seen": len(PROMPTS), "new": 2}
    assert {"eval_seen_win_rate_reference", "eval_new_win_rate_reference"} <= trainer.evaluate().keys()


def test_greedy_evaluation(tmp_path) -> None:
    trainer = make_trainer(tmp_path, eval_dataset=PROMPTS, eval_temperature=0.0, eval_samples_per_prompt=2)
    assert evaluated(trainer)["win_rate_reference"] == pytest.approx(0.5), "likeliest tokens of the same model"


def test_the_log_says_where_time_goes(tmp_path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train()
    for entry in [entry for entry in trainer.state.log_history if "loss" in entry]:
        shares = [entry[f"time/{name}"] for name in PHASES]
        assert all(share >= 0 for share in shares) and 0.3 < sum(shares) <= 1.0
        assert entry["tokens_per_second"] > 0 and entry["skipped_updates"] == 0
    line = speed_line({"tokens_per_second": 1234.5, **{f"time/{name}": 0.25 for name in PHASES}})
    assert line == "1234 tokens/s, 25% rollout"


def test_logs_fit_the_terminal() -> None:
    logs = {"loss": -1234.5678, "time/optimizer": 0.123456789, "step": 3, "note": "x" * 90} | {
        f"metric_{n}": n / 7 for n in range(20)
    }
    lines = log_lines(logs, 80).splitlines()
    assert lines[0] == "  loss -1235  time/optimizer 0.1235  step 3" and lines[1] == "  note " + "x" * 90
    assert all(len(line) <= 80 for line in lines[2:]) and " ".join(lines).split()[-2:] == ["metric_19", "2.714"]


def test_the_bar_shows_the_speed(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    trainer = make_trainer(tmp_path, max_steps=2, disable_tqdm=False)
    assert any(isinstance(callback, Progress) for callback in trainer.callback_handler.callbacks)
    trainer.train()
    output = capsys.readouterr().err
    assert "tokens/s, " in output and "% rollout]" in output and "  update 2  loss " in output
    assert max(len(line) for part in output.splitlines() for line in part.split("\r")) <= 80


def test_reporting_gets_the_numbers(tmp_path) -> None:
    """Metrics arrive through transformers' callbacks, which tensorboard and wandb use."""
    rows = []

    class Writer(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_) -> None:
            rows.append(dict(logs))

    make_trainer(tmp_path, max_steps=1, callbacks=[Writer()]).train()
    row = rows[0]
    assert {"loss", "kl", "preference", "time/rollout", "tokens_per_second", "beta", "tau"} < row.keys()
    assert all(isinstance(value, int | float) for value in row.values()), "numbers are what reporting can take"


def test_samples_are_shown_and_cannot_drive_the_terminal(tmp_path, capsys) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, log_samples=2, samples_per_prompt=3)
    trainer.train()
    output = capsys.readouterr().err
    assert len(set(trainer.experiences[0].prompts[:4])) == 2, "the first three rows are of one prompt"
    assert "update 1" in output and "P(y > y')" in output and output.count("say") + output.count("tell me") == 2
    (experience,) = trainer.experiences
    experience.answers[0][0] = "\x1b[31mred" + "x" * 400
    console = new_console(record=True, width=100)
    samples.show(samples.samples_of(experience, 1), 7, console)
    text = console.export_text()
    assert "\x1b" not in text and "..." in text and "update 7" in text


def test_samples_go_where_numbers_go() -> None:
    """Samples are written to tensorboard and wandb; fake writers record them."""
    sent = []
    board, wandb = TensorBoardCallback.__new__(TensorBoardCallback), WandbCallback.__new__(WandbCallback)
    board.tb_writer = SimpleNamespace(add_text=lambda *arguments: sent.append(arguments))
    wandb._wandb = SimpleNamespace(Table=lambda columns, data: (columns, data), log=sent.append)
    table = samples.Samples(("prompt", "y", "y'", "P(y > y')"), [["a|b", "c\nd", "e", "0.500"]])
    samples.report(table, 3, [board, wandb, TrainerCallback()])
    (name, text, step), logged = sent
    assert (name, step) == ("samples", 3) and text.splitlines()[2] == "| a\\|b | c d | e | 0.500 |"
    assert logged == {"samples": (list(table.columns), table.rows), "train/global_step": 3}
    board.tb_writer = None
    samples.report(table, 3, [board])
    assert len(sent) == 2, "nothing is written before training has begun"


def _broken(model, when):
    """Put NaN into the gradient of the updates in `when`."""
    count = [0]

    def hook(gradient):
        count[0] += 1
        return gradient * math.nan if count[0] in when else gradient

    model.lm_head.weight.register_hook(hook)
    return model


def test_updates_that_are_not_finite_are_skipped_and_counted(tmp_path, caplog) -> None:
    model = _broken(tiny_model("llama"), {2})
    records = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__) -> None:
            records.append(model.lm_head.weight.detach().clone())

    options = {"max_steps": 3, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, model=model, callbacks=[Look()], **options)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "update 1: expected finite gradients; got NaN or infinity; the update is skipped" in caplog.text
    assert [row[0] for row in history(trainer, "skipped_updates")] == [0, 1, 1]
    assert not records[0].equal(records[1]) and records[1].equal(records[2]), "the second update moved nothing"
    resumed = make_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert history(resumed, "skipped_updates")[-1] == (1,), "the count goes on"
    assert all(bool(value.isfinite().all()) for value in model.parameters())


def test_or_they_stop_the_run(tmp_path) -> None:
    trainer = make_trainer(tmp_path, model=_broken(tiny_model("llama"), {2}), max_steps=3, nonfinite="stop")
    with pytest.raises(FloatingPointError, match="NashTrainer: update 1: expected finite gradients"):
        trainer.train()
    assert all(bool(value.isfinite().all()) for value in trainer.model.parameters())


def test_a_policy_of_nan_is_noticed(tmp_path) -> None:
    """Its logits are no distribution: nothing of what it answers moves a weight."""
    model = tiny_model("llama")
    trainer = make_trainer(tmp_path, model=model, max_steps=2, nonfinite="stop")
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(FloatingPointError, match="expected finite weights; got NaN or infinity in lm_head.weight"):
        trainer.train()
    assert int(model.lm_head.weight.isnan().any(1).sum()) == 1
