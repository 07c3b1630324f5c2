"""A resumed run equals an uninterrupted one: after kill -9, after a failing judge, within an epoch; checkpoints are
complete or absent."""

from __future__ import annotations

import dataclasses
import json
import signal

import pytest
import torch

pytest.importorskip("accelerate", reason="training needs accelerate")

from nlhf_kernels.preference import JudgeError
from nlhf_kernels.train import NashConfig, opponents
from nlhf_kernels.train.config import FIXED, own_fields
from nlhf_kernels.train.identity import NEUTRAL, fields_of_a_run
from tests.support import train_run
from tests.support.tiny_models import tiny_model
from tests.support.training import history, likes_e, lora, make_trainer, single_thread  # noqa: F401

RUN = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, "beta": {0: 0.5, 3: 0.25}}
LOGGED = ("loss", "grad_norm", "kl", "preference", "length", "learning_rate")


def same(first: list, second: list) -> bool:
    return len(first) == len(second) > 0 and torch.allclose(torch.tensor(first), torch.tensor(second), rtol=1e-5)


def test_after_kill_9_the_losses_are_those_of_an_uninterrupted_run(tmp_path) -> None:
    """The run is killed while it writes the second checkpoint: the first is whole, the second does not exist."""
    options = {**RUN, "beta": 0.25}  # JSON has no integer keys
    killed = train_run.start(tmp_path / "killed", die_while_saving=True, **options)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in (tmp_path / "killed").glob("checkpoint-*")] == ["checkpoint-2"]
    assert list((tmp_path / "killed").glob(".checkpoint.*.nlhf-unfinished")), "what was being written lies apart"
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = make_trainer(tmp_path / "killed", **options)
    resumed.train(resume_from_checkpoint=True)
    assert same(history(whole, *LOGGED), history(resumed, *LOGGED))
    for name, value in whole.model.named_parameters():
        torch.testing.assert_close(dict(resumed.model.named_parameters())[name], value, rtol=1e-6, atol=1e-7)
    assert not list((tmp_path / "killed").glob("*.nlhf-*")), "no leftovers, no lock"


@pytest.mark.parametrize(
    "options",
    [
        {"peft": True},
        {"algorithm": "nash-ema", "ema_decay": 0.5, "beta": 0.125},
        {"algorithm": "nash-mp", "refresh_steps": 1, "anchor_weight": 0.1, "beta": 0.125, "peft": True},
        {"gradient_accumulation_steps": 2, "bf16": True},
    ],
    ids=["lora", "nash-ema", "nash-mp-lora", "accumulation-bf16"],
)
def test_a_resumed_run_is_the_same_run(options, tmp_path) -> None:
    options = {**RUN, **options}
    adapters = lora() if options.pop("peft", False) else None
    whole = make_trainer(tmp_path, peft_config=adapters, **options)
    whole.train()
    resumed = make_trainer(tmp_path, peft_config=adapters, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(history(whole, *LOGGED), history(resumed, *LOGGED))
    if whole.opponent is not None:
        for name, value in whole.opponent.state().items():
            torch.testing.assert_close(resumed.opponent.state()[name], value, rtol=1e-6, atol=1e-7)


def test_a_failing_judge_costs_no_update(tmp_path) -> None:
    """The judge fails in the third update; the two updates before it are saved although no checkpoint was due."""
    requests = [0]

    def judge(prompts, first, second):
        requests[0] += 1
        if requests[0] == 3:
            raise ConnectionError("the service is away")
        return likes_e(prompts, first, second)

    options = {**RUN, "save_steps": 100}
    stopped = make_trainer(tmp_path, judge=judge, **options)
    with pytest.raises(
        JudgeError, match=r"judge judge: raised ConnectionError: the service is away on 4 pairs"
    ) as caught:
        stopped.train()
    assert len(caught.value.batch.prompts) == 4
    resumed = make_trainer(tmp_path, judge=judge, **options)
    resumed.train(resume_from_checkpoint=True)
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    assert same(history(whole, *LOGGED), history(resumed, *LOGGED))


def test_checkpoints_are_named_by_the_run_that_wrote_them(tmp_path) -> None:
    make_trainer(tmp_path, **RUN, save_total_limit=2).train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
    run = json.loads((tmp_path / "checkpoint-6" / "nash_run.json").read_text())
    assert run["algorithm"] == "nash-md" and run["seed"] == 5 and run["prompts_per_update"] == 4


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"algorithm": "online-ipo", "beta": 0.125}, "algorithm"),
        ({"seed": 6}, "seed"),
        ({"train_dataset": [{"prompt": "another"}] * 16}, "prompts"),
        ({"per_device_train_batch_size": 2}, "prompts_per_update"),
        ({"model": "wider"}, "trained_parameters"),
        ({"model": "other"}, "start"),
        ({"model": "other"}, "reference"),
        ({"reference_model": "other"}, "reference"),
        ({"judge": lambda prompts, first, second: [0.5] * len(prompts)}, "judge"),
        ({"beta": 0.25}, "beta"),
        ({"tau": 0.02}, "tau"),
        ({"kl": "sequence"}, "kl"),
        ({"temperature": 0.9}, "temperature"),
        ({"max_new_tokens": 5}, "max_new_tokens"),
        ({"baseline": "batch"}, "baseline"),
        ({"max_grad_norm": 0.5}, "max_grad_norm"),
        ({"learning_rate": 2e-2}, "learning_rate"),
        ({"bf16": True}, "bf16"),
    ],
)
def test_another_runs_checkpoint_is_refused(changed, name, tmp_path) -> None:
    make_trainer(tmp_path, **{**RUN, "max_steps": 2}).train()
    with pytest.raises(ValueError, match=r"output_dir: expected a folder without checkpoints; got .*checkpoint-2"):
        make_trainer(tmp_path, **RUN).train()
    models = {"wider": tiny_model("llama", hidden=48), "other": tiny_model("llama", seed=7)}
    changed = {key: models[value] if "model" in key else value for key, value in changed.items()}
    with pytest.raises(ValueError, match=rf"checkpoint-2 is another run's: .*its {name} is "):
        make_trainer(tmp_path, **{**RUN, **changed}).train(resume_from_checkpoint=True)


def test_every_field_is_known_to_change_a_run_or_not_to() -> None:
    own = {field.name for field in own_fields()} - set(FIXED)
    assert own == (set(fields_of_a_run()) | set(NEUTRAL)) & own and not set(fields_of_a_run()) & set(NEUTRAL)
    names = {field.name for field in dataclasses.fields(NashConfig)}
    assert set(fields_of_a_run()) | set(NEUTRAL) <= names


def test_differences_that_are_asked_for(tmp_path, caplog) -> None:
    make_trainer(tmp_path, **{**RUN, "max_steps": 2}).train()
    changed = {**RUN, "tau": 0.5, "seed": 6}
    with pytest.raises(
        ValueError, match=r"its tau is 0.01, this run's is 0.5; .*\(resume_changes=\['seed', 'tau'\] goes"
    ):
        make_trainer(tmp_path, **changed).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"another run's: its seed is 5, this run's is 6"):
        make_trainer(tmp_path, **changed, resume_changes=["tau"]).train(resume_from_checkpoint=True)
    resumed = make_trainer(tmp_path, **changed, resume_changes=["tau", "seed"])
    resumed.train(resume_from_checkpoint=True)
    assert "as asked for, not the same run: its tau is 0.01, this run's is 0.5" in caplog.text
    assert [tau for (tau,) in history(resumed, "tau")] == [0.01] * 2 + [0.5] * 4
    for name, why in (
        ("learning_rate", "which the checkpoint holds the state of"),
        ("taus", "which is nothing of a run"),
    ):
        with pytest.raises(ValueError, match=rf"resume_changes: expected some of .*; got '{name}', {why}"):
            make_trainer(tmp_path, **changed, resume_changes=[name]).train(resume_from_checkpoint=True)


def test_adapters_are_part_of_a_run_and_their_first_values_are_not(tmp_path) -> None:
    make_trainer(tmp_path, peft_config=lora(), **{**RUN, "max_steps": 2}).train()
    with pytest.raises(ValueError, match=r"another run's: its adapters is .*'lora_alpha': 8.*'lora_alpha': 16"):
        make_trainer(tmp_path, peft_config=lora(lora_alpha=16), **RUN).train(resume_from_checkpoint=True)
    other = make_trainer(tmp_path, model=tiny_model("llama", seed=7), peft_config=lora(), **RUN)
    with pytest.raises(ValueError, match=r"another run's: its start is "):
        other.train(resume_from_checkpoint=True)
    again = make_trainer(tmp_path, peft_config=lora(), **{**RUN, "max_steps": 3})
    with torch.no_grad():
        for parameter in opponents.trainable_parameters(again.model).values():
            parameter.add_(1.0)
    again.train(resume_from_checkpoint=True)


def test_what_is_no_whole_checkpoint_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="expected a checkpoint in .*; got none"):
        make_trainer(tmp_path, **RUN).train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(ValueError, match="checkpoint-2: expected a checkpoint that this trainer wrote; it has no nlhf"):
        make_trainer(tmp_path, **RUN).train(resume_from_checkpoint=True)
    make_trainer(tmp_path / "light", **{**RUN, "max_steps": 2}, save_only_model=True).train()
    with pytest.raises(ValueError, match=r"expected all that training needs; it has no optimizer.pt, scheduler.pt"):
        make_trainer(tmp_path / "light", **RUN).train(resume_from_checkpoint=True)


def test_the_best_model_is_found_again(tmp_path) -> None:
    options = {
        **RUN, "eval_dataset": [{"prompt": "say e"}] * 2, "eval_strategy": "steps", "eval_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "kl", "greater_is_better": False,
    }  # fmt: skip
    trainer = make_trainer(tmp_path, **options)
    trainer.train()
    kls = {entry["step"]: entry["eval_kl"] for entry in trainer.state.log_history if "eval_kl" in entry}
    best = tmp_path / f"checkpoint-{min(kls, key=lambda step: kls[step])}"
    assert trainer.state.best_model_checkpoint == str(best)
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)


def test_a_run_at_its_end_makes_no_further_update(tmp_path) -> None:
    whole = make_trainer(tmp_path, **RUN)
    whole.train()
    again = make_trainer(tmp_path, **RUN)
    assert again.train(resume_from_checkpoint=True).global_step == 6
    assert history(again, *LOGGED) == history(whole, *LOGGED)
    for name, value in whole.model.named_parameters():
        assert dict(again.model.named_parameters())[name].equal(value), name


def test_resuming_is_an_option_of_the_configuration(tmp_path) -> None:
    make_trainer(tmp_path, **{**RUN, "max_steps": 2}).train()
    resumed = make_trainer(tmp_path, **RUN, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    resumed.train()
    assert resumed.state.global_step == 6 and len(history(resumed, "loss")) == 6
    assert isinstance(resumed.args, NashConfig)
