"""fp16 with a gradient scaler: steps that it skips are counted, NaN is still NaN, and a resumed run is the same run.

accelerate makes a scaler on GPUs only; these tests give it PyTorch's CPU scaler, and run the rest as on a GPU.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("accelerate", reason="training needs accelerate")

from nlhf_kernels.train import NashTrainer
from nlhf_kernels.train.setup import check_processes
from tests.support.tiny_models import tiny_model
from tests.support.training import gradients, history, make_trainer, single_thread  # noqa: F401

OVERFLOW = 2.0**24  # a scale at which gradients of the tiny model overflow
RUN: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-3}


def fp16_trainer(output: Path, init_scale: float = 2.0**10, growth_interval: int = 2, **options: Any) -> Any:
    class WithScaler(NashTrainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.accelerator.native_amp = True
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale, growth_interval=growth_interval)

    return make_trainer(output, trainer=WithScaler, fp16=True, **options)


def same(one: Any, two: Any) -> None:
    for name, value in one.model.named_parameters():
        assert dict(two.model.named_parameters())[name].equal(value), name


def test_gradients_are_those_of_float32_to_float16s_rounding(tmp_path) -> None:
    plain = gradients(make_trainer(tmp_path / "fp32", max_steps=1, max_grad_norm=0.0))
    trainer = fp16_trainer(tmp_path / "fp16", max_steps=1, max_grad_norm=0.0)
    scaled = gradients(trainer)
    assert trainer.rollout_policy.dtype == torch.float16
    assert all(value.dtype == torch.float32 for value in trainer.model.parameters())
    one, two = (torch.cat([part.flatten() for part in parts.values()]) for parts in (plain, scaled))
    assert float((one - two).norm() / one.norm()) < 0.2, "another rounding of logits may change an answer's token"
    assert trainer.skipped_updates == 0


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_steps_that_the_scaler_skips_are_counted_and_change_nothing(optim, tmp_path) -> None:
    class Snapshots(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.weights: list[torch.Tensor] = []

        def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
            self.weights.append(torch.cat([value.detach().flatten() for value in model.parameters()]))

    snapshots = Snapshots()
    trainer = fp16_trainer(
        tmp_path, init_scale=OVERFLOW, max_steps=16, nonfinite="stop", callbacks=[snapshots], optim=optim,
        max_new_tokens=3,
    )  # fmt: skip
    start = torch.cat([value.detach().flatten() for value in trainer.model.parameters()]).clone()
    trainer.train()
    weights = [start, *snapshots.weights]
    unchanged = [bool(before.equal(after)) for before, after in itertools.pairwise(weights)]
    logs = history(trainer, "skipped_updates", "loss_scale")
    counts = [count for count, _ in logs]
    assert unchanged[0] and not all(unchanged), "the first scale is too large, a later one is not"
    assert counts == torch.tensor(unchanged).cumsum(0).tolist()
    assert logs[0][1] == OVERFLOW / 2
    if optim == "adamw_torch":  # accelerate does not see the steps that a fused optimizer skips
        assert trainer.lr_scheduler.last_epoch == 16 - counts[-1], "the learning rate waits for the steps"


@pytest.mark.parametrize("nonfinite", ["skip", "stop"])
def test_a_gradient_that_no_scale_explains_is_an_error(nonfinite, tmp_path) -> None:
    class Poison(transformers.TrainerCallback):
        """Make the gradients of every update NaN, as a bug in a model's backward pass would."""

        def on_step_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
            self.hook = next(model.parameters()).register_hook(lambda grad: grad * torch.nan)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.hook.remove()

    trainer = fp16_trainer(tmp_path, init_scale=4.0, max_steps=5, nonfinite=nonfinite, callbacks=[Poison()])
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    if nonfinite == "stop":
        with pytest.raises(FloatingPointError, match="update 2: expected finite gradients; got NaN or infinity"):
            trainer.train()
    else:
        trainer.train()
        assert history(trainer, "skipped_updates", "loss_scale") == [(1, 2.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 1.0)]
    assert all(value.equal(before[name]) for name, value in trainer.model.named_parameters())


def test_weights_that_break_end_the_run(tmp_path) -> None:
    trainer = fp16_trainer(tmp_path, max_steps=3)
    trainer.model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan  # rollouts use the float16 copy
    trainer.rollout_policy.refresh = lambda: False
    with pytest.raises(FloatingPointError, match=r"update 0: expected finite weights; .*up_proj"):
        trainer.train()


def test_a_resumed_run_is_the_same_run_scale_and_all(tmp_path) -> None:
    options = {**RUN, "init_scale": OVERFLOW, "growth_interval": 1}
    whole = fp16_trainer(tmp_path / "whole", **options)
    whole.train()
    fp16_trainer(tmp_path / "cut", **options | {"max_steps": 3}).train()
    resumed = fp16_trainer(tmp_path / "cut", **options | {"init_scale": 2.0, "resume_changes": None})
    resumed.train(resume_from_checkpoint=True)
    same(whole, resumed)
    assert whole.accelerator.scaler.state_dict() == resumed.accelerator.scaler.state_dict()
    assert whole.skipped_updates == resumed.skipped_updates
    logged = ("loss_scale", "skipped_updates", "loss")
    assert history(whole, *logged)[3:] == history(resumed, *logged)[-3:]


def test_a_checkpoint_without_its_scaler_is_no_checkpoint(tmp_path) -> None:
    from nlhf_kernels.core import manifest

    fp16_trainer(tmp_path, **RUN | {"max_steps": 3}).train()
    (tmp_path / "checkpoint-3" / "scaler.pt").unlink()
    (tmp_path / "checkpoint-3" / manifest.NAME).unlink()
    manifest.write_manifest(tmp_path / "checkpoint-3", "checkpoint")
    with pytest.raises(ValueError, match="expected all that training needs; it has no scaler.pt"):
        fp16_trainer(tmp_path, **RUN).train(resume_from_checkpoint=True)


def test_what_fp16_cannot_be_used_with_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="fp16: expected a GPU, whose gradients are scaled; got cpu"):
        make_trainer(tmp_path, fp16=True)
    half = pytest.raises(ValueError, match="fp16: expected float32 weights to train; got torch.float16 in")
    with half, pytest.warns(UserWarning, match="expected float32 weights"):
        fp16_trainer(tmp_path, model=tiny_model("llama").half())
    with pytest.raises(ValueError, match="fp16"):  # transformers' own message
        make_trainer(tmp_path, fp16=True, bf16=True)


def test_deepspeed_is_refused_with_the_way_to_shard(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="deepspeed: expected None, as models are sharded by FSDP2 here, not by Deep"):
        make_trainer(tmp_path, deepspeed={"zero_optimization": {"stage": 3}})
    args = SimpleNamespace(n_gpu=1)  # as under `accelerate launch --use_deepspeed` without the option
    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value="DEEPSPEED"), num_processes=2)
    with pytest.raises(ValueError, match="sharded by FSDP2 here, not by DeepSpeed; got a DeepSpeed launch"):
        check_processes(args, accelerator, SimpleNamespace(groups=2, name="processes"), {})
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # whether deepspeed is installed or not
    with pytest.raises(ValueError, match="sharded by FSDP2 here, not by DeepSpeed; got a DeepSpeed launch"):
        make_trainer(tmp_path)
