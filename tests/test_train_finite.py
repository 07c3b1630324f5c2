"""Weights and settings that are not finite end a run; such models are never saved or scored."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
import transformers

pytest.importorskip("accelerate", reason="training needs accelerate")

from nlhf_kernels.cli.main import main
from nlhf_kernels.train import NashConfig
from tests.support.tiny_models import tiny_model, tiny_tokenizer
from tests.support.training import PROMPTS, lora, make_trainer, single_thread  # noqa: F401


def broken(architecture: str = "llama", seed: int = 0) -> torch.nn.Module:
    model = tiny_model(architecture, seed=seed)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    return model


class Break(transformers.TrainerCallback):
    """Make a weight infinite after an update, as a far too large learning rate does."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_optimizer_step(self, args, state, control, model=None, **_):
        if state.global_step + 1 == self.after:
            model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.inf


@pytest.mark.parametrize("name", ["model", "reference_model", "eval_opponent"])
def test_models_that_are_not_finite_are_refused(name, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"NashTrainer: {name}: expected finite weights; got NaN or inf.*up_proj"):
        make_trainer(tmp_path, **{name: broken(seed=2)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": math.inf}, r"learning_rate: expected a finite number in \[0.0, inf\); got inf"),
        ({"learning_rate": -1e-5}, r"learning_rate: expected a finite number in \[0.0, inf\); got -1e-05"),
        ({"weight_decay": math.nan}, r"weight_decay: expected a finite number in .*; got nan"),
        ({"adam_beta1": 1.0}, "adam_beta1: expected a number below 1; got 1.0"),
        ({"adam_beta2": math.nan}, "adam_beta2: expected a finite number in .*; got nan"),
        ({"adam_epsilon": 0.0}, r"adam_epsilon: expected a finite number in \(0.0, inf\); got 0.0"),
        ({"max_grad_norm": math.inf}, "max_grad_norm: expected a finite number in .*; got inf"),
        ({"num_train_epochs": math.inf}, "num_train_epochs: expected a finite number in .*; got inf"),
        ({"warmup_steps": -1}, "warmup_steps: expected a finite number in .*; got -1"),
        ({"gradient_accumulation_steps": 0}, r"gradient_accumulation_steps: expected an integer in \[1, .*; got 0"),
        ({"per_device_train_batch_size": 2.5}, "per_device_train_batch_size: expected an integer; got float"),
        ({"max_steps": -3}, r"max_steps: expected an integer in \[-1, .*; got -3"),
        ({"lr_scheduler_kwargs": {"power": math.nan}}, "lr_scheduler_kwargs: expected finite numbers; got nan"),
        ({"metric_for_best_model": "kl", "save_steps": 0}, "save_steps: expected a finite number in .*; got 0"),
    ],
)
def test_settings_are_finite_and_in_range(options, message, tmp_path) -> None:
    with pytest.raises((ValueError, TypeError), match=f"NashConfig: {message}"):
        NashConfig(str(tmp_path), **options)


def test_an_adapters_settings_too(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"peft_config: lora_alpha: expected a finite number in \(0.0, inf\); got nan"):
        make_trainer(tmp_path, peft_config=lora(lora_alpha=math.nan))


def test_weights_that_break_end_the_run(tmp_path, caplog) -> None:
    """Infinite weights end the run, as no later update could repair them; the checkpoint before stays."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(tmp_path, callbacks=[Break(after=3)], **options)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(FloatingPointError, match=r"update 3: expected finite weights; .*up_proj"),
    ):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_weights_that_break_at_the_end_are_not_saved(tmp_path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[Break(after=2)], max_steps=2, save_strategy="steps", save_steps=2)
    with pytest.raises(ValueError, match=r"update 2: the model is not saved: expected finite weights; .*up_proj"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_policy_without_a_distribution_is_not_evaluated(tmp_path) -> None:
    """A policy with finite weights whose logits overflow is not passed to the judge."""
    trainer = make_trainer(tmp_path, eval_dataset=PROMPTS[:4])
    assert trainer.evaluate()["eval_win_rate_reference"] >= 0
    trainer.model.lm_head.weight.data.sign_().mul_(torch.finfo(torch.float32).max)
    with pytest.raises(FloatingPointError, match=r"evaluate: expected finite logits; got NaN or infinity in 4 of 4"):
        trainer.evaluate()


def test_the_command_ends_in_an_error(tmp_path, monkeypatch, capsys) -> None:
    """The command ends without "Saved" and with an error code; bad settings are refused first, under --check too."""
    monkeypatch.chdir(tmp_path)
    for part in (tiny_model("llama"), tiny_tokenizer()):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    (tmp_path / "judge.py").write_text("from tests.support.training import likes_e\n")
    training = {"output_dir": "run", "max_steps": 1, "per_device_train_batch_size": 4, "max_new_tokens": 4,
                "use_cpu": True, "report_to": "none", "save_strategy": "no"}  # fmt: skip
    run = {"model": "model", "data": {"train": "prompts.jsonl"}, "judge": {"function": "judge.py:likes_e"},
           "training": training}  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    for change in ("learning_rate=.inf", "weight_decay=.nan"):
        for more in ([], ["--check"]):
            assert main(["train", "--config", "run.yaml", "--set", f"training.{change}", *more]) == 2
            assert "expected a finite number" in capsys.readouterr().err
    settings = {"learning_rate": "1e38", "adam_epsilon": "1e-30", "max_grad_norm": "0"}  # in range, and too large
    changes = [word for name, value in settings.items() for word in ("--set", f"training.{name}={value}")]
    assert main(["train", "--config", "run.yaml", *changes, "--set", "training.weight_decay=1"]) == 2
    captured = capsys.readouterr()
    assert "expected finite weights" in captured.err and "Saved" not in captured.out
    assert not (tmp_path / "run" / "policy").exists()
